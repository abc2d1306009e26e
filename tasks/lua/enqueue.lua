-- Put messages at the tail of a queue. Sending it again with the same ids adds nothing.
--
-- KEYS  1 queue    list  ids, the next to be fetched first          <namespace>:<queue>
--       2 bodies   hash  id -> message                              <namespace>:<queue>.msgs
--       3 resent   string  written where a transaction may be on its way that puts the same and looks at nothing; it watches
--                  this. Optional.                                  evalstore:<namespace>:<queue>:resent
-- ARGV  id, message, id, message, ...
-- Returns how many were new. The first thing it writes may allocate, so a full server refuses it: nothing is half done.

-- Of what goes with one call of a command: a call for each message takes a third longer. Lua passes some thousand values, and
-- what is asked whether it is there comes here if it is.
local MESSAGES, BYTES = 200, 1024 * 1024

local function put(ids, bodies)
    if #ids == 1 then
        if redis.call("HSETNX", KEYS[2], ids[1], bodies[1]) == 0 then
            return 0
        end
        redis.call("RPUSH", KEYS[1], ids[1])
        return 1
    end
    local new, fields, seen = {}, {}, {}
    for i, there in ipairs(redis.call("HMGET", KEYS[2], unpack(ids))) do
        if not there and not seen[ids[i]] then
            seen[ids[i]] = true
            new[#new + 1] = ids[i]
            fields[#fields + 1] = ids[i]
            fields[#fields + 1] = bodies[i]
        end
    end
    if #new > 0 then
        redis.call("HSET", KEYS[2], unpack(fields))
        redis.call("RPUSH", KEYS[1], unpack(new))
    end
    return #new
end

if KEYS[3] then
    redis.call("SET", KEYS[3], 1, "EX", 60)
end
local total, i = 0, 1
while i <= #ARGV do
    local ids, bodies, bytes = {}, {}, 0
    repeat
        ids[#ids + 1], bodies[#bodies + 1] = ARGV[i], ARGV[i + 1]
        bytes = bytes + #ARGV[i + 1]
        i = i + 2
    until i > #ARGV or #ids == MESSAGES or bytes + #ARGV[i + 1] > BYTES
    total = total + put(ids, bodies)
end
return total

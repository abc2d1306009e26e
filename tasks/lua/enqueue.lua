-- Append messages to a queue. A repeat with the same ids adds nothing.
--
-- KEYS  1 queue    list  ids, the next to be fetched first          <namespace>:<queue>
--       2 bodies   hash  id -> message                              <namespace>:<queue>.msgs
--       3 resent   string  optional; a late transaction with the same messages watches this key, and has no effect after
--                  the write                                        evalstore:<namespace>:<queue>:resent
-- ARGV  id, message, id, message, ...
-- Returns the number of new messages. A full server refuses the first write, so no message is written in part.

-- Limits of one command. A command for each message takes a third longer. Lua's `unpack` takes some thousand values, and HMGET
-- copies the messages that are in Redis already.
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

-- Take the next group of suspects into a process's unacknowledged set, and return it. The process must hold nothing else.
--
-- KEYS  1 suspects  list  packed lists of ids                       evalstore:<namespace>:<queue>:suspects
--       2 bodies    hash  id -> message                             <namespace>:<queue>.msgs
--       3 unacked   zset  id -> fetch * 65536 + place in it         evalstore:<namespace>:<queue>:unacked:<process>
-- ARGV  1 number of this fetch
-- Returns { id, message, id, message, ... }; the same again for the same number.

local first = tonumber(ARGV[1]) * 65536
local ids = redis.call("ZRANGEBYSCORE", KEYS[3], first, first + 65535)
if #ids == 0 then
    local group = redis.call("LPOP", KEYS[1])
    ids = group and cmsgpack.unpack(group) or {}
    for place, id in ipairs(ids) do
        redis.call("ZADD", KEYS[3], first + place - 1, id)
    end
end
local answer = {}
for _, id in ipairs(ids) do
    local body = redis.call("HGET", KEYS[2], id)
    if body then
        answer[#answer + 1] = id
        answer[#answer + 1] = body
    else
        redis.call("ZREM", KEYS[3], id)
    end
end
return answer

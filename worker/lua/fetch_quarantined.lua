-- Move the next group in quarantine to a process's unacknowledged set, and return it. The process must hold nothing else.
--
-- KEYS  1 quarantine list packed groups of ids                      evalstore:<namespace>:<queue>:suspects
--       2 bodies    hash  id -> message                             <namespace>:<queue>.msgs
--       3 unacked   zset  id -> fetch number * 65536 + position         evalstore:<namespace>:<queue>:unacked:<process>
--       4 processes hash  process -> state and heartbeat count      evalstore:<namespace>:<queue>:processes
-- ARGV  1 number of this fetch, 2 process
-- Returns { id, body, id, body, ... }; the same again for the same number. The scores end in .5, by which reclaim.lua knows that
-- the process held nothing else.

local first = tonumber(ARGV[1]) * 65536
local ids = redis.call("ZRANGEBYSCORE", KEYS[3], first, "(" .. string.format("%.0f", first + 65536))
if #ids == 0 then
    local group = redis.call("LPOP", KEYS[1])
    ids = group and cmsgpack.unpack(group) or {}
    for place, id in ipairs(ids) do
        redis.call("ZADD", KEYS[3], first + place - 0.5, id)
    end
    if group then
        redis.call("HSETNX", KEYS[4], ARGV[2], "working:0")
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

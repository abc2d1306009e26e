-- Schedule messages for another attempt, unchanged.
--
-- KEYS  1 unacked  zset  id -> fetch number * 65536 + position          evalstore:<namespace>:<queue>:unacked:<process>
--       2 delayed  zset  id -> due time, ms                         evalstore:<namespace>:<queue>:delayed
-- ARGV  id, delay in ms, id, delay in ms, ...
-- Returns how many of the messages this process held.

local time, postponed = redis.call("TIME"), 0
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 1, #ARGV, 2 do
    if redis.call("ZREM", KEYS[1], ARGV[i]) == 1 then
        redis.call("ZADD", KEYS[2], now + tonumber(ARGV[i + 1]), ARGV[i])
        postponed = postponed + 1
    end
end
return postponed

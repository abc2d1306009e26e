-- Acknowledge a message and schedule its next attempt, in one step.
--
-- KEYS  1 unacked  zset  id -> fetch number * 65536 + position          evalstore:<namespace>:<queue>:unacked:<process>
--       2 bodies   hash  id -> message                              <namespace>:<queue>.msgs
--       3 delayed  zset  id -> due time, ms                         evalstore:<namespace>:<queue>:delayed
-- ARGV  1 id, 2 new body, 3 delay in ms
-- Returns 1 if this process held the message, else 0.

if redis.call("ZREM", KEYS[1], ARGV[1]) == 0 then
    return 0
end
local now = redis.call("TIME")
redis.call("HSET", KEYS[2], ARGV[1], ARGV[2])
redis.call("ZADD", KEYS[3], now[1] * 1000 + math.floor(now[2] / 1000) + tonumber(ARGV[3]), ARGV[1])
return 1

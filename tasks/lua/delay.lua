-- Keep a message aside until it is due. Sending it again with the same id changes nothing.
--
-- KEYS  1 bodies   hash  id -> message                              <namespace>:<queue>.msgs
--       2 delayed  zset  id -> when it is due, ms                   evalstore:<namespace>:<queue>:delayed
-- ARGV  id, message, delay in ms
-- Returns 1 if it was new.

if redis.call("HSETNX", KEYS[1], ARGV[1], ARGV[2]) == 0 then
    return 0
end
local now = redis.call("TIME")
redis.call("ZADD", KEYS[2], now[1] * 1000 + math.floor(now[2] / 1000) + tonumber(ARGV[3]), ARGV[1])
return 1

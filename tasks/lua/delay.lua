-- Store a message that is due later. A repeat with the same id changes nothing.
--
-- KEYS  1 bodies   hash  id -> message                              <namespace>:<queue>.msgs
--       2 delayed  zset  id -> due time, in ms                      evalstore:<namespace>:<queue>:delayed
-- ARGV  id, message, delay in ms
-- Returns 1 if the message is new, else 0.

if redis.call("HSETNX", KEYS[1], ARGV[1], ARGV[2]) == 0 then
    return 0
end
local now = redis.call("TIME")
redis.call("ZADD", KEYS[2], now[1] * 1000 + math.floor(now[2] / 1000) + tonumber(ARGV[3]), ARGV[1])
return 1

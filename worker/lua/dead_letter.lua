-- Turn messages into dead letters, each with its cause.
--
-- KEYS  1 unacked      zset  id -> fetch * 65536 + place in it      evalstore:<namespace>:<queue>:unacked:<process>
--       2 bodies       hash  id -> message                          <namespace>:<queue>.msgs
--       3 dead         zset  id -> when it died, ms                 evalstore:<namespace>:<queue>:dead
--       4 dead bodies  hash  id -> message, as received             evalstore:<namespace>:<queue>:dead:msgs
--       5 causes       hash  id -> JSON                             evalstore:<namespace>:<queue>:dead:causes
--       6 deaths       hash  id -> processes that died of it alone  evalstore:<namespace>:<queue>:deaths
-- ARGV  id, cause, id, cause, ...
-- Returns how many were this process's.

local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local buried = 0
for i = 1, #ARGV, 2 do
    local id = ARGV[i]
    if redis.call("ZREM", KEYS[1], id) == 1 then
        local body = redis.call("HGET", KEYS[2], id)
        if body then
            redis.call("HDEL", KEYS[2], id)
            redis.call("ZADD", KEYS[3], now, id)
            redis.call("HSET", KEYS[4], id, body)
            redis.call("HSET", KEYS[5], id, ARGV[i + 1])
        end
        redis.call("HDEL", KEYS[6], id)
        buried = buried + 1
    end
end
return buried

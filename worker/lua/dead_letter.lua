-- Turn messages into dead letters, each with its cause.
--
-- KEYS  1 unacked      zset  id -> fetch number * 65536 + position      evalstore:<namespace>:<queue>:unacked:<process>
--       2 bodies       hash  id -> message                          <namespace>:<queue>.msgs
--       3 dead         zset  id -> time of death, ms                evalstore:<namespace>:<queue>:dead
--       4 dead bodies  hash  id -> message, as received             evalstore:<namespace>:<queue>:dead:msgs
--       5 causes       hash  id -> JSON                             evalstore:<namespace>:<queue>:dead:causes
--       6 deaths       hash  id -> processes that it killed alone   evalstore:<namespace>:<queue>:deaths
-- ARGV  id, cause as JSON, id, cause as JSON, ...
-- Returns how many of the messages this process held.

local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local dead = 0
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
        dead = dead + 1
    end
end
return dead

-- Take back the messages of a dead process.
--
-- KEYS  1 processes    hash  process -> state and heartbeat count   evalstore:<namespace>:<queue>:processes
--       2 unacked      zset  ids that the dead process held         evalstore:<namespace>:<queue>:unacked:<process>
--       3 queue        list  ids, the next to be fetched first      <namespace>:<queue>
--       4 bodies       hash  id -> message                          <namespace>:<queue>.msgs
--       5 quarantine   list  packed groups of ids                   evalstore:<namespace>:<queue>:suspects
--       6 deaths       hash  id -> processes that it killed alone   evalstore:<namespace>:<queue>:deaths
--       7 dead         zset  id -> time of death, ms                evalstore:<namespace>:<queue>:dead
--       8 dead bodies  hash  id -> message, as received             evalstore:<namespace>:<queue>:dead:msgs
--       9 causes       hash  id -> JSON                             evalstore:<namespace>:<queue>:dead:causes
--       10 workers     hash  process -> time in ms, and JSON        evalstore:<namespace>:<queue>:workers
-- ARGV  1 dead process, 2 its state and count as last seen, 3 "1" if it died while working, 4 deaths that make a dead letter,
--       5 cause as JSON
-- Returns { messages that it held, new dead letters }. The first is -1 where the process wrote a heartbeat since, or was
-- reclaimed already.
--
-- Messages of a process that died while working go to quarantine in two halves. A process fetches a half while it holds nothing
-- else, and so on until the message that kills is alone. Only a message fetched alone from quarantine counts a death: else
-- the process may have died of a message of another queue.

if redis.call("HGET", KEYS[1], ARGV[1]) ~= ARGV[2] then
    return { -1, 0 }
end
redis.call("HDEL", KEYS[1], ARGV[1])
redis.call("HDEL", KEYS[10], ARGV[1])
local ids = redis.call("ZRANGE", KEYS[2], 0, -1)
local first = redis.call("ZRANGE", KEYS[2], 0, 0, "WITHSCORES")[2]
local dead = 0
local was_alone = #ids == 1 and tonumber(first) % 1 ~= 0
redis.call("DEL", KEYS[2])

if ARGV[3] ~= "1" then
    for i = #ids, 1, -1 do
        redis.call("LPUSH", KEYS[3], ids[i])
    end
elseif was_alone then
    local id, body = ids[1], redis.call("HGET", KEYS[4], ids[1])
    if body and redis.call("HINCRBY", KEYS[6], id, 1) >= tonumber(ARGV[4]) then
        local time = redis.call("TIME")
        redis.call("HDEL", KEYS[4], id)
        redis.call("HDEL", KEYS[6], id)
        redis.call("ZADD", KEYS[7], time[1] * 1000 + math.floor(time[2] / 1000), id)
        redis.call("HSET", KEYS[8], id, body)
        redis.call("HSET", KEYS[9], id, ARGV[5])
        dead = 1
    elseif body then
        redis.call("LPUSH", KEYS[5], cmsgpack.pack(ids))
    end
else
    local half, group = math.ceil(#ids / 2), {}
    for place, id in ipairs(ids) do
        group[#group + 1] = id
        if place == half or place == #ids then
            redis.call("RPUSH", KEYS[5], cmsgpack.pack(group))
            group = {}
        end
    end
end
return { #ids, dead }

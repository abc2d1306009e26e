-- Take back what a dead process held.
--
-- KEYS  1 processes    hash  process -> state and count of beats    evalstore:<namespace>:<queue>:processes
--       2 unacked      zset  what the dead process held             evalstore:<namespace>:<queue>:unacked:<process>
--       3 queue        list  ids, the next to be fetched first      <namespace>:<queue>
--       4 bodies       hash  id -> message                          <namespace>:<queue>.msgs
--       5 suspects     list  packed lists of ids                    evalstore:<namespace>:<queue>:suspects
--       6 deaths       hash  id -> processes that died of it alone  evalstore:<namespace>:<queue>:deaths
--       7 dead         zset  id -> when it died, ms                 evalstore:<namespace>:<queue>:dead
--       8 dead bodies  hash  id -> message, as received             evalstore:<namespace>:<queue>:dead:msgs
--       9 causes       hash  id -> JSON                             evalstore:<namespace>:<queue>:dead:causes
--       10 workers     hash  process -> when, ms, and JSON          evalstore:<namespace>:<queue>:workers
-- ARGV  1 dead process, 2 its state and count as last seen, 3 "1" if it died at work, 4 deaths that make a dead letter, 5 cause
-- Returns { how many messages it held, or -1 if it has beaten since or was reclaimed already; how many are dead letters now }.
--
-- What it held when it died at work is suspected of having killed it, and comes back in halves, each to be worked on by a process
-- that holds nothing else, until the culprit is alone. Only then is a death counted against it: a message that happened to be the
-- only one of its queue may have died of another queue's.

if redis.call("HGET", KEYS[1], ARGV[1]) ~= ARGV[2] then
    return { -1, 0 }
end
redis.call("HDEL", KEYS[1], ARGV[1])
redis.call("HDEL", KEYS[10], ARGV[1])  -- or those of all who ever died would add up
local ids = redis.call("ZRANGE", KEYS[2], 0, -1)
local first = redis.call("ZRANGE", KEYS[2], 0, 0, "WITHSCORES")[2]
local buried = 0
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
        buried = 1
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
return { #ids, buried }

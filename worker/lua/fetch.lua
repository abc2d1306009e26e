-- Move messages from the head of a queue to a process's unacknowledged set, and return their ids. A small batch comes with its
-- bodies, which saves a round trip; the caller reads the bodies of a large batch, as a script would copy each twice more.
--
-- KEYS  1 queue     list  ids, the next to be fetched first         <namespace>:<queue>
--       2 bodies    hash  id -> message                             <namespace>:<queue>.msgs
--       3 unacked   zset  id -> fetch number * 65536 + position         evalstore:<namespace>:<queue>:unacked:<process>
--       4 delayed   zset  id -> due time, ms                        evalstore:<namespace>:<queue>:delayed
--       5 quarantine list packed groups of ids                      evalstore:<namespace>:<queue>:suspects
--       6, 7        list, hash: delayed by stock clients            <namespace>:<queue>.DQ, <namespace>:<queue>.DQ.msgs
--       8 processes hash  process -> state and heartbeat count      evalstore:<namespace>:<queue>:processes
--       9 woken     list  ids that woke a waiting process           evalstore:<namespace>:<queue>:woken
-- ARGV  1 number of this fetch, 2 maximum of messages, 3 maximum of bytes, 4 process
-- Returns { groups in quarantine, ms until the next delayed message is due or -1, messages left in the queue, { id, ... }
-- [, { body or nil, ... }] }.
--
-- A client that lost the reply asks again with the same number, and gets the same ids.
-- Every path begins with a write that frees or moves memory, so that workers can drain a full server.

local first, most = tonumber(ARGV[1]) * 65536, tonumber(ARGV[2])
local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local woke = redis.call("RPOP", KEYS[9])
while woke do
    redis.call("LPUSH", KEYS[1], woke)
    woke = redis.call("RPOP", KEYS[9])
end

-- Messages that stock clients delayed move to `delayed`, by their eta. Unreadable ones are due now: the worker rejects them.
for _ = 1, math.min(redis.call("LLEN", KEYS[6]), 100) do
    local id = redis.call("LPOP", KEYS[6])
    local body = redis.call("HGET", KEYS[7], id)
    if body then
        local decoded, message = pcall(cjson.decode, body)
        local due = decoded and type(message) == "table" and type(message.options) == "table" and tonumber(message.options.eta)
        if not due or due ~= due or math.abs(due) > 1e15 then  -- not a time, or out of range
            due = now
        end
        redis.call("HDEL", KEYS[7], id)
        redis.call("HSET", KEYS[2], id, body)
        redis.call("ZADD", KEYS[4], due, id)
    end
end

for _, id in ipairs(redis.call("ZRANGEBYSCORE", KEYS[4], "-inf", now, "LIMIT", 0, 1000)) do
    redis.call("ZREM", KEYS[4], id)
    redis.call("RPUSH", KEYS[1], id)
end
local next_due = redis.call("ZRANGE", KEYS[4], 0, 0, "WITHSCORES")[2]
local answer = { redis.call("LLEN", KEYS[5]), next_due and math.max(0, math.ceil(next_due - now)) or -1 }

local ids = redis.call("ZRANGEBYSCORE", KEYS[3], first, "(" .. string.format("%.0f", first + 65536))
local bytes = 0
if #ids > 0 then
    bytes = math.huge  -- repeated fetch: the size is unknown
else
    -- Locals outside the loop: lookups of names cost 10 % with thousands of messages.
    local call, bodies, limit = redis.call, KEYS[2], tonumber(ARGV[3])
    local places, number, taken = {}, 0, 0
    for place, id in ipairs(call("LRANGE", KEYS[1], 0, most - 1)) do
        local size = call("HSTRLEN", bodies, id)
        if number > 0 and bytes + size > limit then
            break
        end
        taken, bytes = place, bytes + size
        if size > 0 or call("HEXISTS", bodies, id) == 1 then
            number = number + 1
            ids[number] = id
            places[2 * number - 1], places[2 * number] = first + number - 1, id
        end
    end
    if taken > 0 then
        redis.call("LTRIM", KEYS[1], taken, -1)
    end
    for i = 1, #places, 4000 do
        redis.call("ZADD", KEYS[3], unpack(places, i, math.min(i + 3999, #places)))
    end
    if #places > 0 then
        redis.call("HSETNX", KEYS[8], ARGV[4], "working:0")  -- it may die before its first heartbeat
    end
end

answer[3], answer[4] = redis.call("LLEN", KEYS[1]), ids
if #ids > 0 and #ids <= 1000 and bytes <= 65536 then
    answer[5] = redis.call("HMGET", KEYS[2], unpack(ids))
end
return answer

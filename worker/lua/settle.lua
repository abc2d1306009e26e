-- Acknowledge messages, but for those that another process took over.
--
-- KEYS  1 unacked  zset  id -> fetch number * 65536 + position          evalstore:<namespace>:<queue>:unacked:<process>
--       2 bodies   hash  id -> message                              <namespace>:<queue>.msgs
--       3 deaths   hash  id -> processes that it killed alone       evalstore:<namespace>:<queue>:deaths
-- ARGV  id, id, ...
-- Returns how many of the messages this process held.

local settled, any_deaths = 0, redis.call("EXISTS", KEYS[3]) == 1
for i = 1, #ARGV, 4000 do
    local chunk, ours = { unpack(ARGV, i, math.min(i + 3999, #ARGV)) }, {}
    for place, score in ipairs(redis.call("ZMSCORE", KEYS[1], unpack(chunk))) do
        if score then
            ours[#ours + 1] = chunk[place]
        end
    end
    if #ours > 0 then
        redis.call("ZREM", KEYS[1], unpack(ours))
        redis.call("HDEL", KEYS[2], unpack(ours))
        if any_deaths then
            redis.call("HDEL", KEYS[3], unpack(ours))
        end
        settled = settled + #ours
    end
end
return settled

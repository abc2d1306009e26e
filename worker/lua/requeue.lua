-- Put messages back at the head of their queue, in their order.
--
-- KEYS  1 unacked  zset  id -> fetch number * 65536 + position          evalstore:<namespace>:<queue>:unacked:<process>
--       2 queue    list  ids, the next to be fetched first          <namespace>:<queue>
-- ARGV  id, id, ...
-- Returns how many of the messages this process held.

local given = 0
for i = #ARGV, 1, -1 do
    if redis.call("ZREM", KEYS[1], ARGV[i]) == 1 then
        redis.call("LPUSH", KEYS[2], ARGV[i])
        given = given + 1
    end
end
return given

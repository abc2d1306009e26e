-- Put messages back at the head of their queue, the first of them first.
--
-- KEYS  1 unacked  zset  id -> fetch * 65536 + place in it          evalstore:<namespace>:<queue>:unacked:<process>
--       2 queue    list  ids, the next to be fetched first          <namespace>:<queue>
-- ARGV  id, id, ...
-- Returns how many were this process's.

local given = 0
for i = #ARGV, 1, -1 do
    if redis.call("ZREM", KEYS[1], ARGV[i]) == 1 then
        redis.call("LPUSH", KEYS[2], ARGV[i])
        given = given + 1
    end
end
return given

-- Put dead letters at the tail of a queue, but for those that are queued already, or died again and are not moved yet.
--
-- KEYS  1 queue        list  ids, the next to be fetched first       <namespace>:<queue>
--       2 bodies       hash  id -> message                           <namespace>:<queue>.msgs
--       3 dead bodies  hash  id -> message, as received              evalstore:<namespace>:<queue>:dead:msgs
-- ARGV  id, body, id, body, ...
-- Returns how many were added.

local new = 0
for i = 1, #ARGV, 2 do
    if redis.call("HEXISTS", KEYS[3], ARGV[i]) == 0 and redis.call("HSETNX", KEYS[2], ARGV[i], ARGV[i + 1]) == 1 then
        redis.call("RPUSH", KEYS[1], ARGV[i])
        new = new + 1
    end
end
return new

-- Put messages at the tail of a queue. Sending it again with the same ids adds nothing.
--
-- KEYS  1 queue    list  ids, the next to be fetched first          <namespace>:<queue>
--       2 bodies   hash  id -> message                              <namespace>:<queue>.msgs
-- ARGV  id, message, id, message, ...
-- Returns how many were new. Begins with a write that may allocate, so a full server refuses it: nothing is half done.

local new = 0
for i = 1, #ARGV, 2 do
    if redis.call("HSETNX", KEYS[2], ARGV[i], ARGV[i + 1]) == 1 then
        redis.call("RPUSH", KEYS[1], ARGV[i])
        new = new + 1
    end
end
return new

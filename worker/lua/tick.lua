-- Send a periodic job's message, unless a scheduler has sent it for this minute.
--
-- KEYS  1 tick     string  one key per job and minute              evalstore:<namespace>:tick:<job>:<minute>
--       2 queue    list    ids, the next to be fetched first       <namespace>:<queue>
--       3 bodies   hash    id -> message                           <namespace>:<queue>.msgs
-- ARGV  1 id, 2 body
-- Returns 1 if it was sent, else 0.

if not redis.call("SET", KEYS[1], ARGV[1], "NX", "EX", 3600) then
    return 0
end
redis.call("HSET", KEYS[3], ARGV[1], ARGV[2])
redis.call("RPUSH", KEYS[2], ARGV[1])
return 1

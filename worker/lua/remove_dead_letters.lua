-- Remove dead letters that were moved to PostgreSQL.
--
-- KEYS  1 dead         zset  id -> time of death, ms                evalstore:<namespace>:<queue>:dead
--       2 dead bodies  hash  id -> message, as received             evalstore:<namespace>:<queue>:dead:msgs
--       3 causes       hash  id -> JSON                             evalstore:<namespace>:<queue>:dead:causes
-- ARGV  id, id, ...
-- Returns nothing.

for i = 1, #ARGV do
    redis.call("ZREM", KEYS[1], ARGV[i])
    redis.call("HDEL", KEYS[2], ARGV[i])
    redis.call("HDEL", KEYS[3], ARGV[i])
end

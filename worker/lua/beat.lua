-- A process says that it lives, and learns of the others.
--
-- KEYS  1 processes  hash  process -> state and count of its beats  evalstore:<namespace>:<queue>:processes
-- ARGV  1 process, 2 its state and count
-- Returns all of them, { process, state and count, ... }.

redis.call("HDEL", KEYS[1], ARGV[1])  -- frees before it allocates: a full server still takes it
redis.call("HSET", KEYS[1], ARGV[1], ARGV[2])
return redis.call("HGETALL", KEYS[1])

-- A process says that it lives, and learns of the others.
--
-- KEYS  1 processes  hash  process -> state and count of its beats  evalstore:<namespace>:<queue>:processes
--       2 workers    hash  process -> when, ms, and JSON            evalstore:<namespace>:<queue>:workers
-- ARGV  1 process, 2 its state and count, 3 what others may know of it, as JSON
-- Returns all of them, { process, state and count, ... }.

redis.call("HDEL", KEYS[1], ARGV[1])  -- frees before it allocates: a full server still takes it
redis.call("HSET", KEYS[1], ARGV[1], ARGV[2])
local time = redis.call("TIME")
redis.call("HDEL", KEYS[2], ARGV[1])
redis.call("HSET", KEYS[2], ARGV[1], time[1] * 1000 + math.floor(time[2] / 1000) .. " " .. ARGV[3])
return redis.call("HGETALL", KEYS[1])

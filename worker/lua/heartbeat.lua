-- Write a process's heartbeat, and return those of all processes.
--
-- KEYS  1 processes  hash  process -> state and heartbeat count     evalstore:<namespace>:<queue>:processes
--       2 workers    hash  process -> time in ms, and JSON          evalstore:<namespace>:<queue>:workers
-- ARGV  1 process, 2 its state and count, 3 its status as JSON
-- Returns { process, state and count, process, state and count, ... }.

redis.call("HDEL", KEYS[1], ARGV[1])  -- frees before it allocates: a full server accepts the script
redis.call("HSET", KEYS[1], ARGV[1], ARGV[2])
local time = redis.call("TIME")
redis.call("HDEL", KEYS[2], ARGV[1])
redis.call("HSET", KEYS[2], ARGV[1], time[1] * 1000 + math.floor(time[2] / 1000) .. " " .. ARGV[3])
return redis.call("HGETALL", KEYS[1])

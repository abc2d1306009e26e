-- When messages were sent, without handing over what they hold.
--
-- KEYS  1 bodies  hash  id -> message                               <namespace>:<queue>.msgs
-- ARGV  id, id, ...
-- Returns the times, in ms since 1970, of those that say so where Dramatiq writes it: at their end.

local found = {}
for _, id in ipairs(ARGV) do
    local sent = string.match(string.sub(redis.call("HGET", KEYS[1], id) or "", -300), '"message_timestamp": *(%d+)')
    if sent then
        found[#found + 1] = sent
    end
end
return found

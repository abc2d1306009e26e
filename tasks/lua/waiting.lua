-- Return the send times of messages, without their bodies.
--
-- KEYS  1 bodies  hash  id -> message                               <namespace>:<queue>.msgs
-- ARGV  id, id, ...
-- Returns times in ms since 1970, of the messages that have one. Dramatiq writes it at the end of a message.

local name = '"message_timestamp"%s*:%s*(%d+)'
local found = {}
for _, id in ipairs(ARGV) do
    local body = redis.call("HGET", KEYS[1], id) or ""
    local sent = string.match(string.sub(body, -300), name) or string.match(body, name)
    if sent then
        found[#found + 1] = sent
    end
end
return found

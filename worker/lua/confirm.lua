-- Append confirmations to the stream and publish each on the channel of its type.
--
-- KEYS  1 stream   evalstore:confirmations
-- ARGV  1, 2 the last entry it is known to have had, ms and sequence; 3 oldest entry to keep, ms; 4 how many there are; then a line
--       of JSON each; then, unless none has one, a traceparent each, empty or to become a field of its own
-- Returns { ms, sequence, 1 } with its last entry now; or { ms, sequence, 0 }, having done nothing, where it does not reach to
-- the entry it is known to have had: the server lost what it had confirmed.

local function parts(id)
    local ms, sequence = string.match(id, "^(%d+)-(%d+)$")
    return tonumber(ms), tonumber(sequence)
end

local ms, sequence = 0, 0
local newest = redis.call("XREVRANGE", KEYS[1], "+", "-", "COUNT", 1)[1]
if newest then
    ms, sequence = parts(newest[1])
end
local known_ms, known_sequence = tonumber(ARGV[1]), tonumber(ARGV[2])
if ms < known_ms or (ms == known_ms and sequence < known_sequence) then
    return { ms, sequence, 0 }
end
local id
local count = tonumber(ARGV[4])
for i = 5, 4 + count do
    local kind = string.match(ARGV[i], '"type":"([^"]+)"')
    local traceparent = ARGV[i + count]
    if traceparent and traceparent ~= "" then
        id = redis.call("XADD", KEYS[1], "*", "confirmation", ARGV[i], "traceparent", traceparent)
    else
        id = redis.call("XADD", KEYS[1], "*", "confirmation", ARGV[i])
    end
    redis.call("PUBLISH", kind, ARGV[i])
end
if id then
    ms, sequence = parts(id)
    redis.call("XTRIM", KEYS[1], "MINID", "~", ARGV[3])  -- once: with each entry it is a quarter of the time
end
return { ms, sequence, 1 }

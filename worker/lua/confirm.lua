-- Append confirmations to the stream, and publish each on the channel of its type unless nobody listens.
--
-- KEYS  1 stream   the confirmations                       evalstore:confirmations, after the prefix in ARGV 6
-- ARGV  1, 2 id of the last entry that was known, ms and sequence; 3 how long entries are kept, ms; 4 confirmations, one JSON
--       object per line; 5 empty, or 55 characters per confirmation: its traceparent, or spaces; 6 prefix of the channels'
--       names: empty, or <namespace>:
-- Returns { ms, sequence, 1 } with the id of the last entry. Returns { ms, sequence, 0 } and does nothing where the stream ends
-- before the known entry: the server lost entries. Raises NOPERM, and leaves no entry, where the user may not publish.

local function parts(id)
    local ms, sequence = string.match(id, "^(%d+)-(%d+)$")
    return tonumber(ms), tonumber(sequence)
end

-- Return the line of `text` that begins at `first`, and the start of the next. One argument for all lines costs half as much as
-- one for each.
local function line_at(text, first)
    local stop = string.find(text, "\n", first, true) or #text + 1
    return string.sub(text, first, stop - 1), stop + 1
end

-- Return whether a client may listen: to this server, a replica, or another node of a cluster. True where the server does not
-- tell, and for a small number of confirmations, where asking takes longer than publishing. docs/decisions/0025
local function may_be_heard()
    if #ARGV[4] < 4096 then
        return true
    end
    local function says(section, line)
        local info = redis.pcall("INFO", section)
        return type(info) == "string" and string.find(info, line .. "\r\n", 1, true)
    end
    local names = {"PUBSUB", "NUMSUB"}
    for _, name in ipairs({"evaluation:created", "evaluation:updated", "evaluation:erased", "evaluation:repaired",
        "run:finished", "run:updated", "anomaly:detected"}) do
        names[#names + 1] = ARGV[6] .. "storage:" .. name
    end
    local channels = redis.pcall(unpack(names))
    local nobody = redis.pcall("PUBSUB", "NUMPAT") == 0
    for at = 2, #channels, 2 do
        nobody = nobody and channels[at] == 0
    end
    return not (nobody and says("replication", "connected_slaves:0") and says("cluster", "cluster_enabled:0"))
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
local id, line
local ids = {}
local at, trace_at = 1, 1
local is_heard = may_be_heard()
while at <= #ARGV[4] do
    line, at = line_at(ARGV[4], at)
    if (string.byte(ARGV[5], trace_at) or 32) ~= 32 then
        local traceparent = string.sub(ARGV[5], trace_at, trace_at + 54)
        id = redis.call("XADD", KEYS[1], "*", "confirmation", line, "traceparent", traceparent)
    else
        id = redis.call("XADD", KEYS[1], "*", "confirmation", line)
    end
    if is_heard then
        ids[#ids + 1] = id
        local published = redis.pcall("PUBLISH", ARGV[6] .. string.match(line, '"type":"([^"]+)"'), line)
        if type(published) == "table" then
            -- The user has no right to the channel. Each retry would add the same entries again.
            for first = 1, #ids, 1000 do
                redis.call("XDEL", KEYS[1], unpack(ids, first, math.min(first + 999, #ids)))
            end
            return published
        end
    end
    trace_at = trace_at + 55
end
if id then
    ms, sequence = parts(id)
    -- Once, as a trim for each entry takes a quarter of the time. By this server's clock, which made the ids.
    redis.call("XTRIM", KEYS[1], "MINID", "~", string.format("%.0f", math.max(0, redis.call("TIME")[1] * 1000 - ARGV[3])))
end
return { ms, sequence, 1 }

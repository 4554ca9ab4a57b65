-- One step of a journal: writes rows, removes old ones, and returns what is new.
--
-- A row has a key, a value, and a version, of which the greatest wins.  Each row that is
-- written gets the next number: the microsecond of this server's clock, or one more
-- than the last number.  Readers keep the last number that they have seen.
--
-- KEYS  rows (hash: "VERSION VALUE" by key), order (sorted set: numbers by key),
--       mortal (sorted set: numbers of the rows that are removed when they are old),
--       life (hash: "id", made by the first step, and "last", the last number)
-- ARGV  id (for a new life), known id, cursor, prefix of the keys not to return,
--       rows to return at most, rows to keep at most, age at which mortal rows are
--       removed (microseconds), mortal ("all" rows, or those that are "empty"), expiry
--       of the journal (milliseconds; 0: none), channel, message; and of each row to
--       write: its key, "aAGE:KNOWN" (wins over the version that is known), "vVERSION",
--       or "n" (only if there is none with a value), and its value
-- Returns the id, this server's time, the new cursor, whether there is more, for each
--       row to write "+VERSION", "-VERSION VALUE" (the one in force) or "!" (no room),
--       and key, number and "VERSION VALUE" of each row that is new
local rows, order, mortal, life = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local function text(number) return string.format('%.0f', number) end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local id = redis.call('HGET', life, 'id')
if id and redis.call('HLEN', rows) ~= redis.call('ZCARD', order) then
  redis.call('DEL', rows, order, mortal, life)  -- one was deleted: hubs write it again
  id = false
end
if not (id and string.match(id, '^%x+$')) then  -- or of another program
  id = ARGV[1]
  redis.call('HSET', life, 'id', id)
end
local cursor = id == ARGV[2] and ARGV[3] or '0'
-- What is no number of this script is of another program.
local last = tonumber(redis.call('HGET', life, 'last') or '0') or 0
if not (last >= 0 and last < 2 ^ 53) then last = 0 end
local first = last
local results = {}
for at = 12, #ARGV, 3 do
  local key, when, value = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local kind, amount, known = string.match(when, '^(%a)(%d*):?(%d*)$')
  amount, known = tonumber(amount) or 0, tonumber(known) or 0
  local stored = redis.call('HGET', rows, key)
  local held, content = 0, ''
  if stored then
    local number, rest = string.match(stored, '^(%d+) (.*)$')
    held, content = tonumber(number) or 0, rest or ''
  end
  local number = math.max(now, last + 1)
  local version = amount
  if kind == 'a' then
    version = math.max(number - amount, known + 1)
    if amount == 0 then version = math.max(number, held + 1) end
  elseif kind == 'n' then
    version = content == '' and math.max(number, held + 1) or 0
  end
  if stored and held >= version then
    results[#results + 1] = '-' .. stored
  elseif not stored and redis.call('HLEN', rows) >= tonumber(ARGV[6]) then
    results[#results + 1] = '!'
  else
    last = number
    redis.call('HSET', rows, key, text(version) .. ' ' .. value)
    redis.call('ZADD', order, text(number), key)
    if ARGV[8] == 'all' or value == '' then
      redis.call('ZADD', mortal, text(number), key)
    else
      redis.call('ZREM', mortal, key)
    end
    results[#results + 1] = '+' .. text(version)
  end
end
local old = redis.call(
  'ZRANGEBYSCORE', mortal, '-inf', text(now - tonumber(ARGV[7])), 'LIMIT', 0, 100)
for _, key in ipairs(old) do
  redis.call('HDEL', rows, key)
  redis.call('ZREM', order, key)
  redis.call('ZREM', mortal, key)
end
if last > first then
  redis.call('HSET', life, 'last', text(last))
  if ARGV[10] ~= '' then redis.call('PUBLISH', ARGV[10], ARGV[11]) end
end
if tonumber(ARGV[9]) > 0 then
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[9]) end
end
local most = tonumber(ARGV[5])
local found = redis.call(
  'ZRANGEBYSCORE', order, '(' .. cursor, text(math.max(now, last)), 'WITHSCORES',
  'LIMIT', 0, most)
local news = {}
for at = 1, #found, 2 do
  local key = found[at]
  cursor = found[at + 1]
  if ARGV[4] == '' or string.sub(key, 1, #ARGV[4]) ~= ARGV[4] then
    news[#news + 1] = key
    news[#news + 1] = text(tonumber(cursor))
    news[#news + 1] = redis.call('HGET', rows, key) or '0 '
  end
end
return {id, text(now), text(tonumber(cursor)), #found == 2 * most and 1 or 0, results,
  news}

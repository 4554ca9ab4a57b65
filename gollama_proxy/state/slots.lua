-- One synchronization of a hub: it renews and gives back leases of slots, registers the
-- requests that wait, and grants free slots to those of all hubs.  `slots.py` encodes the
-- request and decodes the reply; the theory is there.
--
-- KEYS  era, serial, epoch, then for each ask: leases of the worker (sorted set: lease ->
--       when it expires), its line (packed: the requests that wait, and their turns)
-- ARGV  prefix of channels; run id of the hub; milliseconds that a lease, a line and the
--       caution after an outage last; the epoch as the hub knows it, or ''; how many hubs
--       have to register what they hold; 1 if this call has all of it; the asks (msgpack)
--
-- All times are milliseconds of the store's clock.  No decision relies on the expiry of a
-- key: that only removes what no hub uses any more.

local KEEP = 600000  -- milliseconds that unused keys are kept
local MINUTE, CALL = 60000, 5000  -- for longer no hub is silent
local AT_ONCE = 1000  -- pairs in one command: Lua has room for 8,000 values
local MOST_TURNS = 256  -- in a round, so that ever new subjects cannot keep it open
local REPEAT = 1000  -- milliseconds between two notices that requests wait for a worker

local prefix, hub = ARGV[1], ARGV[2]
local lifetime, patience, caution = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local epoch, hubs, whole = ARGV[6], tonumber(ARGV[7]), ARGV[8] == '1'
local asks = cmsgpack.unpack(ARGV[9])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Whether hubs may hold leases that are not registered, as the store was empty or not
-- used; and whether some certainly have not registered theirs since it was empty.
local function cautious()
  local since, registered = now, {}
  local era = redis.call('GET', KEYS[1])
  local readable
  readable, era = pcall(cmsgpack.unpack, era or '')
  if readable and type(era) == 'table' and tonumber(era[1]) and tonumber(era[2]) then
    if math.abs(now - era[2]) <= lifetime then since, registered = era[1], era[3] end
  end
  local careful = now - since < caution
  local blind = epoch ~= '' and redis.call('GET', KEYS[3]) ~= epoch
  if not careful or type(registered) ~= 'table' then registered = {} end
  if careful and whole and not blind then registered[hub] = true end
  redis.call('SET', KEYS[1], cmsgpack.pack({since, now, registered}), 'PX', KEEP)
  local count = 0
  for _ in pairs(registered) do count = count + 1 end
  return careful, blind or careful and count < hubs
end

local careful, blind = cautious()

-- Numbers of leases are never used twice, also after the store has come back empty.
local serial
local function new_lease(owner)
  if not serial then
    local last = tonumber(redis.call('GET', KEYS[2]) or 0) or 0
    serial = math.max(time[1] * 1000000 + time[2], last)
  end
  serial = serial + 1
  return owner .. ':' .. string.format('%.0f', serial)
end

local function set_of(...)
  local set = {}
  for _, list in ipairs({...}) do
    for _, each in ipairs(list) do set[each] = true end
  end
  return set
end

-- Return how many of them had ended.
local function renew(key, leases)
  -- As text: Lua takes longer to print a number than the server to parse it.
  local expires, added = string.format('%.0f', now + lifetime), 0
  for first = 1, #leases, AT_ONCE do
    local members = {}
    for i = first, math.min(first + AT_ONCE - 1, #leases) do
      members[#members + 1] = expires
      members[#members + 1] = leases[i]
    end
    added = added + redis.call('ZADD', key, unpack(members))
  end
  return added
end

local function remove(key, leases)
  for first = 1, #leases, AT_ONCE do
    redis.call('ZREM', key, unpack(leases, first, math.min(first + AT_ONCE - 1, #leases)))
  end
end

-- Lines ----------------------------------------------------------------------------
--
-- {format, waiting = {hub: {seen, {{subject, rank, requests, queue, tick, key}, ..}}},
--  rounds = {rank: {turn, had, {subject: {turn, tick}}}},
--  sent = {lease: {hub, subject, expires, key, rank}}, tick,
--  announced = when, unaware = {hub: true}}: hubs with no news since that others wait
--
-- Hubs of another format have other lines; the leases are the same.

local FORMAT = 1
local SUBJECT, RANK, REQUESTS, QUEUE, TICK, KEY = 1, 2, 3, 4, 5, 6

local function read_line(packed)
  local readable, line = pcall(cmsgpack.unpack, packed or '')
  if packed and readable and type(line) == 'table' and line.format == FORMAT then
    for _, part in ipairs({'waiting', 'rounds', 'sent', 'unaware'}) do
      readable = readable and type(line[part]) == 'table'
    end
    if readable and tonumber(line.tick) then return line, true end
  end
  return {format = FORMAT, waiting = {}, rounds = {}, sent = {}, tick = 0, unaware = {}}, false
end

local function next_tick(line)
  line.tick = line.tick + 1
  return line.tick
end

-- Of each hub, the requests that were granted a slot in this call, by their key: they
-- still wait in other lines.
local served = {}

local function left(owner, want)
  local done = served[owner]
  return want[REQUESTS] - (done and done[want[KEY]] or 0)
end

local function serve(owner, key)
  local done = served[owner] or {}
  served[owner] = done
  done[key] = (done[key] or 0) + 1
end

local function replace_wants(line, wants)
  local ticks, before = {}, line.waiting[hub]
  for _, want in ipairs(before and before[2] or {}) do ticks[want[KEY]] = want[TICK] end
  line.waiting[hub] = nil
  if #wants > 0 then
    for _, want in ipairs(wants) do
      -- The same for requests that are alike, wherever they wait.
      local key = want[RANK] .. '\0' .. want[QUEUE] .. '\0' .. want[SUBJECT]
      want[TICK], want[KEY] = ticks[key] or next_tick(line), key
    end
    line.waiting[hub] = {now, wants}
  end
end

-- Drop what hubs registered that have not been heard of since, and old grants.
local function prune_line(line)
  for owner, entry in pairs(line.waiting) do
    if math.abs(now - entry[1]) > patience then line.waiting[owner] = nil end
  end
  for lease, grant in pairs(line.sent) do
    if grant[3] <= now or grant[3] > now + lifetime then line.sent[lease] = nil end
  end
end

-- Turns ----------------------------------------------------------------------------

local function round_of(line, rank)
  local name = tostring(rank)
  line.rounds[name] = line.rounds[name] or {0, 0, {}}
  return line.rounds[name]
end

local function before(a, b)
  if a.rank ~= b.rank then return a.rank < b.rank end
  if a.turn ~= b.turn then return a.turn < b.turn end
  if a.tick ~= b.tick then return a.tick < b.tick end
  return a.name < b.name
end

local function by_tick(a, b) return a.want[TICK] < b.want[TICK] end

-- Return the subjects that wait, in the order of their turns, each with its hubs' wants.
-- With `only`, those of one hub.
local function candidates(line, only)
  local subjects, list = {}, {}
  for owner, entry in pairs(line.waiting) do
    if not only or owner == only then
      for _, want in ipairs(entry[2]) do
        local rank, name = want[RANK], want[SUBJECT]
        subjects[rank] = subjects[rank] or {}
        local one = subjects[rank][name]
        if not one then
          one = {name = name, rank = rank, wants = {}}
          subjects[rank][name] = one
          list[#list + 1] = one
        end
        one.wants[#one.wants + 1] = {owner = owner, want = want, seen = entry[1]}
      end
    end
  end
  for _, one in ipairs(list) do
    table.sort(one.wants, by_tick)
    local round = round_of(line, one.rank)
    local mine = round[3][one.name] or {round[1], one.wants[1].want[TICK]}
    mine[1] = math.max(mine[1], round[1])
    round[3][one.name] = mine
    one.turn, one.tick = mine[1], mine[2]
  end
  table.sort(list, before)
  return list
end

local function had_turn(line, one)
  local round = round_of(line, one.rank)
  if one.turn > round[1] then round[1], round[2] = one.turn, 0 end
  round[2] = round[2] + 1
  if round[2] >= MOST_TURNS then round[1], round[2] = round[1] + 1, 0 end
  one.turn, one.tick = one.turn + 1, next_tick(line)
  round[3][one.name] = {one.turn, one.tick}
end

-- Return the hub, and its want, of the request that is next; it has had its turn then.
local function next_request(line, list)
  while list[1] do
    local one = table.remove(list, 1)
    while one.wants[1] do
      local found = table.remove(one.wants, 1)
      if left(found.owner, found.want) > 0 then
        -- The hubs of a subject take turns, too.
        found.want[TICK] = next_tick(line)
        one.wants[#one.wants + 1] = found
        had_turn(line, one)
        local at = #list + 1
        while at > 1 and before(one, list[at - 1]) do at = at - 1 end
        table.insert(list, at, one)
        return found
      end
    end
  end
end

-- Forget the turns of subjects that do not wait, unless they had theirs in this round.
local function forget_turns(line)
  if next(line.rounds) == nil then return end
  local waits = {}
  for _, entry in pairs(line.waiting) do
    for _, want in ipairs(entry[2]) do
      local rank = tostring(want[RANK])
      waits[rank] = waits[rank] or {}
      waits[rank][want[SUBJECT]] = true
    end
  end
  for rank, round in pairs(line.rounds) do
    local there = waits[rank] or {}
    for name, mine in pairs(round[3]) do
      if mine[1] <= round[1] and not there[name] then round[3][name] = nil end
    end
  end
end

-- Give a subject its turn back, before all others: its hub did not use the slot.
local function refund(line, rank, name)
  local mine = round_of(line, rank)[3][name]
  if mine then mine[1], mine[2] = mine[1] - 1, 0 end
end

-- Grants ---------------------------------------------------------------------------

-- Return the grants to this hub that it does not know of, and forget those that it does.
local function unseen(ask)
  local line, found, known, unused = ask.line, {}, nil, nil
  for lease, grant in pairs(line.sent) do
    if grant[1] == hub then
      known = known or set_of(ask.held, ask.back)
      unused = unused or set_of(ask.unused)
      if unused[lease] and grant[2] ~= '' then refund(line, grant[5], grant[2]) end
      if known[lease] or unused[lease] then
        line.sent[lease] = nil
      else
        found[#found + 1] = {lease, grant[2]}
        serve(hub, grant[4])
      end
    end
  end
  return found
end

local messages = {}  -- hub: grants that others than the caller get

local function grant(ask, owner, expires, want)
  local lease, subject = new_lease(owner), want and want[SUBJECT] or ''
  local key = want and want[KEY] or ''
  redis.call('ZADD', ask.leases, expires, lease)
  ask.line.sent[lease] = {owner, subject, expires, key, want and want[RANK] or 0}
  ask.taken = ask.taken + 1
  serve(owner, key)
  if owner == hub then
    ask.granted[#ask.granted + 1] = {lease, subject}
  else
    messages[owner] = messages[owner] or {}
    table.insert(messages[owner], {ask.worker, lease, subject})
  end
end

-- Return how many slots the caller could be granted, if no request went before it.
local function free_of(ask)
  local free = ask.slots - ask.taken
  if blind then free = 0 end
  if careful then free = math.min(free, ask.fair - ask.holds - #ask.granted) end
  return math.max(free, 0)
end

local function grant_free(ask)
  local line, free, list = ask.line, free_of(ask), {}
  if free > 0 and next(line.waiting) ~= nil then
    list = candidates(line, careful and hub)
  end
  while free > 0 do
    local found = next_request(line, list)
    if not found then break end
    -- A hub's leases end when it was last heard of, also those that it did not ask for
    -- in this call: after its death, slots are free again within one lifetime.
    grant(ask, found.owner, found.seen + lifetime, found.want)
    free = free - 1
  end
  if free > 0 and ask.spare > 0 then
    for owner, entry in pairs(line.waiting) do
      for _, want in ipairs(entry[2]) do
        if left(owner, want) > 0 then return end
      end
    end
    -- Half of what is free stays in the store for the other hubs.
    if ask.fair < ask.slots and not careful then free = math.floor(free / 2) end
    for _ = 1, math.min(free, ask.spare) do grant(ask, hub, now + lifetime) end
  end
end

-- Write the line, without the requests that were served in this call.
local function write_line(ask)
  local line, others, own = ask.line, 0, 0
  for owner, entry in pairs(line.waiting) do
    local rest = {}
    for _, want in ipairs(entry[2]) do
      local count = left(owner, want)
      if count > 0 then
        want[REQUESTS] = count
        rest[#rest + 1] = want
        if owner == hub then own = own + count else others = others + count end
      end
    end
    if #rest > 0 then entry[2] = rest else line.waiting[owner] = nil end
  end
  if own + others == 0 then
    line.rounds, line.announced, line.unaware = {}, nil, {}
    if not next(line.sent) then
      if ask.stored then redis.call('DEL', ask.key) end
      return others, false
    end
  else
    forget_turns(line)
  end
  line.unaware[hub] = nil
  local announce = own + others > 0 and ask.taken > ask.holds + #ask.granted
    and (own > 0 and next(line.unaware) ~= nil
      or math.abs(now - (line.announced or 0)) >= REPEAT)
  if announce then line.announced, line.unaware = now, {} end
  if own > 0 and others == 0 then line.unaware[hub] = true end
  redis.call('SET', ask.key, cmsgpack.pack(line), 'PX', KEEP)
  return others, announce
end

-- ----------------------------------------------------------------------------------

local line_keys = {}
for i = 5, #KEYS, 2 do line_keys[#line_keys + 1] = KEYS[i] end
local lines = #asks > 0 and redis.call('MGET', unpack(line_keys)) or {}
for i, row in ipairs(asks) do
  local ask = {
    worker = row[1], slots = row[2], fair = row[3], held = row[4], back = row[5],
    spare = row[6], wants = row[7], unused = row[8], holds = math.max(row[9], #row[4]),
    leases = KEYS[2 * i + 2], key = KEYS[2 * i + 3],
  }
  asks[i] = ask
  redis.call('ZREMRANGEBYSCORE', ask.leases, '-inf', now)
  remove(ask.leases, ask.back)
  remove(ask.leases, ask.unused)
  ask.added = renew(ask.leases, ask.held)
  ask.line, ask.stored = read_line(lines[i])
  prune_line(ask.line)
  ask.granted = unseen(ask)
  replace_wants(ask.line, ask.wants)
end
for _, ask in ipairs(asks) do
  ask.taken = redis.call('ZCOUNT', ask.leases, now + 1, now + lifetime)
  grant_free(ask)
  if ask.added + #ask.granted > 0 or now % MINUTE < CALL then
    redis.call('PEXPIRE', ask.leases, KEEP)
  end
end
local replies, wanted = {}, {}
for i, ask in ipairs(asks) do
  local others, announce = write_line(ask)
  if announce then wanted[#wanted + 1] = ask.worker end
  replies[i] = {ask.worker, ask.granted, others, free_of(ask)}
end
if serial then
  redis.call('SET', KEYS[2], string.format('%.0f', serial), 'PX', KEEP)
end
for owner, grants in pairs(messages) do
  redis.call('PUBLISH', prefix .. ':grants:' .. owner, cmsgpack.pack(grants))
end
if #wanted > 0 then
  redis.call('PUBLISH', prefix .. ':wanted', cmsgpack.pack(wanted))
end
return cmsgpack.pack(replies)

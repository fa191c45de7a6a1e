"""Thresholds in Redis: reads, and writes that happen at once or not at all.

Every write is a script that Redis runs as one step: it compares the version, keeps the two-person rule, writes record
and history, and announces the change. A product has one record, for the network that is served. A network that is not
has a record of its own, `<product>:<sha256>`: what was set before its promotion, or before another one's. History and
versions are the product's. Called by the commands; the line only reads. One client; safe from every thread.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

import redis

from pipeline.errors import CheckError, ConfigError
from pipeline.limits import RECORD_FIELDS, Change, check_limits, check_words, of_model
from pipeline.redis_client import explained, open_client
from pipeline.servers import Redis as RedisSettings

KEY = "logicrd:threshold:"
CHANNEL = "logicrd:thresholds"
POLICY_KEY = "logicrd:threshold-policy"
HISTORY_LENGTH = 1000
PROPOSAL_FIELDS = (
    *("id", "action", "ng", "review", "base", "model_sha256", "reason"),
    *("updated_by", "updated_as", "updated_at", "expires_at"),
)
_LONGEST_FIELD = 4096  # bytes; a record holds numbers, names and a reason

# What the scripts share. ARGV[1] is a JSON object; numbers in it are texts, for Lua would round them.
_SHARED = """
local asked = cjson.decode(ARGV[1])

local function whole(text)
  if type(text) == 'string' and #text <= 14 and string.match(text, '^%d+$') then return tonumber(text) end
  return 0
end

local function field(key, name)
  if redis.call('TYPE', key).ok ~= 'hash' then return false end
  return redis.call('HGET', key, name)
end

-- The record that counts for a network: the later one of the product's, where it is for it, and of its own.
local function counting(key, sha)
  local own = key .. ':' .. sha
  local is_own = field(own, 'model_sha256') == sha
  if field(key, 'model_sha256') ~= sha then return is_own and own or key end
  return is_own and whole(field(own, 'version')) > whole(field(key, 'version')) and own or key
end

-- Limits of a network that is served no longer become its own record: they hold again after a rollback.
local function keep(key, sha)
  local held = field(key, 'model_sha256')
  if not held or held == sha or #held ~= 64 or not string.match(held, '^[0-9a-f]+$') then return end
  local own = key .. ':' .. held
  if counting(key, held) == own then return end
  redis.call('DEL', own)
  for _, name in ipairs(asked.fields) do
    local value = redis.call('HGET', key, name)
    if value then redis.call('HSET', own, name, value) end
  end
end

-- The number of the next version is above all that were ever given, also when the record was lost or written by hand.
local function next_version(key, sha, floor)
  local last = math.max(whole(field(key, 'version')), whole(field(counting(key, sha), 'version')), whole(floor))
  for _, entry in ipairs(redis.call('XREVRANGE', key .. ':history', '+', '-', 'COUNT', 50)) do
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 'version' then last = math.max(last, whole(entry[2][i + 1])) end
    end
  end
  return string.format('%.0f', last + 1)
end

local function note(key, fields)
  redis.call('XADD', key .. ':history', 'MAXLEN', '~', asked.history, '*', unpack(fields))
end

local function has_sound_history(key)
  local kind = redis.call('TYPE', key .. ':history').ok
  return kind == 'stream' or kind == 'none'
end

local function record_of(key, sha, beside) return beside and key .. ':' .. sha or key end

local function put(key, change, fields)
  local record = record_of(key, change.model_sha256, change.beside)
  local version = next_version(key, change.model_sha256, change.floor)
  fields[#fields + 1] = 'version'
  fields[#fields + 1] = version
  note(key, fields)
  if record == key then keep(key, change.model_sha256) end
  redis.call('DEL', record, record .. ':proposal')
  redis.call('HSET', record, unpack(fields))
  redis.call('PUBLISH', asked.channel, change.product)
  return version
end
"""

# KEYS: one record a change. First all is checked, then all is written. The policy is no key of it: Redis would ask for
# the right to write every key that is named here, and an engineer may only read that one.
_WRITE = """
for i, change in ipairs(asked.changes) do
  local held = field(counting(KEYS[i], change.model_sha256), 'version') or '0'
  if change.expected and change.expected ~= held then return {'version', change.product, held} end
  if not has_sound_history(KEYS[i]) then return {'history', KEYS[i] .. ':history'} end
end
local kind = redis.call('TYPE', asked.policy).ok
local alone = kind == 'none' or field(asked.policy, 'approvals') == '1'
local answer = {alone and 'set' or 'proposed'}
for i, change in ipairs(asked.changes) do
  local key = KEYS[i]
  local fields = {'action', asked.action, 'ng', change.ng, 'review', change.review,
                  'model_sha256', change.model_sha256, 'updated_at', asked.at, 'updated_by', asked.author,
                  'updated_as', asked.user, 'reason', change.reason}
  if alone then
    answer[i + 1] = put(key, change, fields)
  else
    local found = record_of(key, change.model_sha256, change.beside) .. ':proposal'
    local base = field(counting(key, change.model_sha256), 'version') or '0'
    local lasts_s = whole(field(asked.policy, 'expiry_s'))
    if lasts_s < 60 then lasts_s = 28800 end
    local told = {'id', change.id, 'base', base, unpack(fields)}
    redis.call('DEL', found)
    redis.call('HSET', found, 'person', asked.person, 'floor', change.floor, unpack(told))
    redis.call('EXPIRE', found, lasts_s)
    told[6] = 'proposed'  -- what happened, where the proposal itself keeps what is asked for
    note(key, told)
    answer[i + 1] = change.id
  end
end
return answer
"""

# KEYS: the product's record. Whoever has proposed something cannot approve it. What was proposed for a network that was
# not served waits at its own record.
_SETTLE = """
local key = KEYS[1]
local found = key .. ':proposal'
if field(found, 'id') ~= asked.id then found = key .. ':' .. asked.model_sha256 .. ':proposal' end
if field(found, 'id') ~= asked.id then return {'none'} end
if not has_sound_history(key) then return {'history', key .. ':history'} end
local who = {'updated_at', asked.at, 'updated_by', asked.author, 'updated_as', asked.user, 'reason', asked.reason}
if asked.action == 'withdrawn' then
  note(key, {'action', 'withdrawn', 'id', asked.id, unpack(who)})
  redis.call('DEL', found)
  return {'withdrawn'}
end
local get = function(name) return field(found, name) or '' end
if get('person') == asked.person then return {'same', get('updated_by')} end
local kind = redis.call('TYPE', asked.policy).ok
if kind ~= 'none' and field(asked.policy, 'people') ~= 'authors' and get('updated_as') == asked.user then
  return {'same', 'the user ' .. asked.user .. ' of Redis'}
end
if get('model_sha256') ~= asked.model_sha256 then return {'model'} end
local held = field(counting(key, asked.model_sha256), 'version') or '0'
if held ~= get('base') then return {'version', held, get('base')} end
local fields = {'approved_by', asked.author, 'approved_as', asked.user, 'updated_at', asked.at}
for _, name in ipairs({'action', 'ng', 'review', 'model_sha256', 'updated_by', 'updated_as', 'reason'}) do
  fields[#fields + 1] = name
  fields[#fields + 1] = get(name)
end
asked.floor = get('floor')
redis.call('DEL', found)
return {'set', put(key, asked, fields)}
"""


@dataclass(frozen=True, slots=True)
class Policy:
    """Who may put limits in force.

    `approvals` 1: whoever may write. 2: a second person has to approve within `expiry_s`. `people` says what makes two
    people: two names as given (`authors`), or besides two users of Redis, each with a password of his own (`users`).
    """

    approvals: Literal[1, 2] = 1
    expiry_s: int = 28_800
    people: Literal["authors", "users"] = "authors"


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a change: in force as `version`, or waiting for approval as `proposal`."""

    product: str
    version: int | None = None
    proposal: str | None = None


class ThresholdStore:
    """The thresholds of all products in one Redis. Methods raise DependencyError when Redis refuses or is away."""

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        self._user = settings.user or "default"
        self.client = open_client(settings)

    def get(self, product: str, fields: Sequence[str] = RECORD_FIELDS) -> dict[str, str]:
        """Give these fields of a product's record, as they stand; empty when there is no record.

        Raises ConfigError for a key that is no hash or a field too long to be meant.
        """
        return self._hash(KEY + product, fields)

    def of_model(self, product: str, model_sha256: str, fields: Sequence[str] = RECORD_FIELDS) -> Mapping[str, str]:
        """Give these fields of the record that counts for a network, see `limits.of_model`.

        Raises ConfigError as `get`, where no other record counts.
        """
        faults = []
        # In this order: a record that is kept for a rollback meanwhile is found in one place at least.
        found: list[dict[str, str]] = [{}, {}]
        for i, key in enumerate((product, f"{product}:{model_sha256}")):
            try:
                found[i] = self.get(key, fields)
            except ConfigError as error:
                faults.append(error)
        record = of_model(found[0], found[1], model_sha256)
        if faults and record.get("model_sha256") != model_sha256:
            raise faults[0]
        return record

    def proposal(self, product: str, model_sha256: str = "") -> dict[str, str]:
        """Give what waits for approval, with `expires_at`; empty when nothing does.

        With `model_sha256` what waits for a network that was not served. Raises ConfigError as `get`.
        """
        key = f"{KEY}{product}:{model_sha256}:proposal" if model_sha256 else f"{KEY}{product}:proposal"
        found = self._hash(key, PROPOSAL_FIELDS)
        with self._reachable():
            left_s = self.client.ttl(key) if found else 0
        if left_s > 0:
            until = datetime.fromtimestamp(datetime.now(UTC).timestamp() + left_s, UTC)
            found["expires_at"] = until.isoformat(timespec="seconds")
        return found

    def history(self, product: str, count: int) -> list[dict[str, str]]:
        """Give the last changes of a product, newest first; those only proposed have no `version`."""
        with self._reachable(f"{KEY}{product}:history"):
            entries = cast(
                "list[tuple[str, dict[str, str]]]", self.client.xrevrange(f"{KEY}{product}:history", count=count)
            )
        return [fields for _, fields in entries]

    def write(self, changes: Sequence[Change], *, author: str, action: str = "set") -> list[Written]:
        """Put all of the changes in force, or none; under the two-person rule they become proposals.

        Raises ConfigError for limits or words that make no sense, CheckError when somebody changed one meanwhile.
        """
        for change in changes:
            check_limits(change.ng, change.review)
            check_words(author, change.reason)
        told = [
            {
                **asdict(change),
                "ng": repr(float(change.ng)),
                "review": repr(float(change.review)),
                "floor": str(change.floor),
                "expected": False if change.expected is None else change.expected,
                "id": uuid.uuid4().hex[:8],
            }
            for change in changes
        ]
        keys = [KEY + change.product for change in changes]
        kind, *answers = self._run(_WRITE, keys, author, action=action, changes=told)
        if kind == "version":
            expected = next(change.expected for change in changes if change.product == answers[0])
            raise CheckError(
                f"threshold of {answers[0]!r} is at version {answers[1][:20]}, not {expected}; nothing was written",
                hint="look at `logicrd thresholds history`, then set it again",
            )
        pairs = zip((change.product for change in changes), answers, strict=True)
        if kind == "proposed":
            return [Written(product, proposal=answer) for product, answer in pairs]
        return [Written(product, version=int(answer)) for product, answer in pairs]

    def approve(self, product: str, proposal: str, *, author: str, model_sha256: str, beside: bool = False) -> int:
        """Put a proposal of somebody else in force; gives the version. `beside` as in `Change`.

        Raises CheckError when there is no such proposal (any more), when it is the author's own, or when the limits in
        force or the model have changed since.
        """
        kind, *told = self._settle(
            product, proposal, author, action="approved", model_sha256=model_sha256, beside=beside
        )
        if kind == "set":
            return int(told[0])
        refusals = {
            "same": f"it was proposed by the same person ({told[0] if told else ''}): somebody else has to approve it",
            "version": f"it was made for version {told[-1] if told else ''}, and {told[0] if told else ''} is in force",
            "model": "it was made for another model",
        }
        raise CheckError(f"proposal {proposal} of {product!r}: {refusals[kind]}", hint="`logicrd thresholds proposals`")

    def withdraw(self, product: str, proposal: str, *, author: str, model_sha256: str, reason: str = "") -> None:
        """Take a proposal back, one's own or another's. Raises CheckError when there is none of that id."""
        self._settle(product, proposal, author, action="withdrawn", model_sha256=model_sha256, reason=reason)

    def policy(self) -> Policy:
        """Give the rule in force; one that makes no sense demands two people."""
        try:
            fields = self._hash(POLICY_KEY, ("approvals", "expiry_s", "people"))
        except ConfigError:
            return Policy(approvals=2, people="users")
        if not fields:
            return Policy()
        expiry = fields.get("expiry_s", "")
        return Policy(
            approvals=1 if fields.get("approvals") == "1" else 2,
            expiry_s=int(expiry) if expiry.isdecimal() and 60 <= int(expiry) < 10**14 else 28_800,
            people="authors" if fields.get("people") == "authors" else "users",
        )

    def set_policy(self, policy: Policy, *, author: str, reason: str = "") -> None:
        """Put a rule in force, and note who did it. Raises ConfigError for words that make no sense."""
        check_words(author, reason)
        fields = {name: str(value) for name, value in asdict(policy).items()}
        fields |= {"updated_by": author, "updated_as": self._user, "reason": reason}
        with self._reachable(), self.client.pipeline(transaction=True) as steps:
            fields["updated_at"] = self._now()
            steps.delete(POLICY_KEY)
            steps.hset(POLICY_KEY, mapping=cast("Any", fields))
            steps.xadd(f"{POLICY_KEY}:history", cast("Any", fields), maxlen=HISTORY_LENGTH)
            steps.execute()

    def _settle(
        self, product: str, proposal: str, author: str, *, action: str, reason: str = "", **told: str | bool
    ) -> list[str]:
        asked = {"product": product, "id": proposal, "reason": reason, **told}
        check_words(author, reason)
        answer = self._run(_SETTLE, [KEY + product], author, action=action, **asked)
        if answer[0] == "none":
            raise CheckError(
                f"{product!r} has no proposal {proposal}",
                hint="expired, replaced or settled: `... proposals` lists them",
            )
        return answer

    def _run(self, script: str, keys: list[str], author: str, **asked: Any) -> list[str]:  # noqa: ANN401 (to JSON)
        asked |= {
            "author": author,
            "person": " ".join(author.split()).casefold(),
            "user": self._user,
            "fields": RECORD_FIELDS,
            "history": HISTORY_LENGTH,
            "channel": CHANNEL,
            "policy": POLICY_KEY,
        }
        with self._reachable():
            asked["at"] = self._now()
            answer = self.client.eval(_SHARED + script, len(keys), *keys, json.dumps(asked))
        kind, *told = cast("list[str]", answer)
        if kind == "history":
            raise ConfigError(f"{told[0]} in Redis is no history", hint=f"move it away: RENAME {told[0]} ...")
        return [kind, *told]

    def _now(self) -> str:
        """Give Redis's own time: one clock for all who write, so that it tells what was set after what."""
        seconds, micros = self.client.time()
        return datetime.fromtimestamp(seconds + micros / 1e6, UTC).isoformat(timespec="milliseconds")

    def _hash(self, key: str, fields: Sequence[str]) -> dict[str, str]:
        """Read fields of a hash, after a look at how long they are."""
        with self._reachable(key), self.client.pipeline(transaction=False) as lengths:
            for field in fields:
                lengths.hstrlen(key, field)
            for field, length in zip(fields, lengths.execute(), strict=True):
                if length > _LONGEST_FIELD:
                    raise ConfigError(f"{key} in Redis: `{field}` has {length} bytes", hint="set it again")
            values = cast("list[str | None]", self.client.hmget(key, list(fields)))
        return {field: value for field, value in zip(fields, values, strict=True) if value is not None}

    @contextlib.contextmanager
    def _reachable(self, key: str = "") -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            if key and "WRONGTYPE" in str(error):
                raise ConfigError(f"{key} in Redis is of another type", hint="set it again, or delete it") from None
            raise explained(self._settings, error) from None

"""The types of settings: how a value is spelled, checked and described.

A setting is declared as `Annotated[type, constraint, help]`.  The constraint is a
`msgspec.Meta` made by one of the functions below: msgspec checks the ranges, and what
else there is travels in `extra`:

    allowed   the description of the allowed values, for errors and documentation
    unit      "bytes" if a string such as "64MiB" is a number here
    split     False if a string is never a list of words
    check     a function that takes the converted value and returns the final one
    secret    True if no error may show the value

Strings are accepted for every type, since environment variables and flags have nothing
else: "8000", "yes", "a, b" for a list, "a=b, c=d" for a table.

Mistakes are one line each; they are collected, and reported together.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Meta

_P = ParamSpec("_P")
_T = TypeVar("_T")


# --- Mistakes ---------------------------------------------------------------------


class ConfigError(Exception):
    """Raised for unusable settings; each argument is one line about one mistake."""

    def __str__(self) -> str:
        return "\n".join(self.args)


class Mistakes:
    """Collects the mistakes of several steps, so that none hides another."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __repr__(self) -> str:
        return f"<Mistakes {len(self._found)}>"

    def __len__(self) -> int:
        return len(self._found)

    def collect(
        self, step: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T | None:
        """Run a step and return its result; None if it raised a `ConfigError`."""
        try:
            return step(*args, **kwargs)
        except ConfigError as exc:
            self._found += exc.args
            return None

    def add(self, text: str) -> None:
        self._found.append(text)

    def check(self) -> None:
        """Raise all mistakes that were collected, if any.

        Raises:
            ConfigError: with a line for each.
        """
        if self._found:
            raise ConfigError(*self._found)


def shown(value: object) -> str:
    """Quote a value for a mistake."""
    return cut(repr(value))


def cut(text: str) -> str:
    """Shorten a text that would make a line too long."""
    return text if len(text) <= 80 else text[:77] + "..."


# --- Constraints ------------------------------------------------------------------


def number(low: float, high: float, unit: str = "a number") -> Meta:
    return Meta(ge=low, le=high, extra={"allowed": _range(unit, low, high)})


def whole(low: int, high: int) -> Meta:
    return number(low, high, "a whole number")


def seconds(low: float = 0, high: float = 86_400) -> Meta:
    return number(low, high, "a number of seconds")


def size(low: int, high: int = 1 << 40) -> Meta:
    allowed = f"bytes or a size such as 64MiB, at least {low}"
    return Meta(ge=low, le=high, extra={"allowed": allowed, "unit": "bytes"})


def one_of(*names: str) -> Meta:
    pattern = "|".join(map(re.escape, names))
    allowed = "one of " + ", ".join(names)
    return Meta(pattern=rf"\A(?:{pattern})\Z", extra={"allowed": allowed})


def other(
    allowed: str, check: Callable[[Any], Any] = lambda value: value, **extra: Any
) -> Meta:
    """Describe values that `check` judges or changes; it may raise `ValueError`."""
    return Meta(extra={"allowed": allowed, "check": check, **extra})


def _range(unit: str, low: float, high: float) -> str:
    return f"{unit} from {low:g} to {high:,.0f}"


class SecretUrl(str):
    """A URL that may hold a password, which no formatted text shows.

    Only what reads it as a string, such as `urlsplit`, finds the password.
    """

    __slots__ = ()

    @property
    def masked(self) -> str:
        """The URL for people: with dots in place of the user and the password."""
        text = re.sub(r"//.*@", "//...@", self, flags=re.DOTALL)
        return re.sub(r"(?i)(\b(?:password|username)=)[^&]*", r"\1...", text)

    def __str__(self) -> str:
        return self.masked

    def __format__(self, spec: str) -> str:
        return format(self.masked, spec)

    def __repr__(self) -> str:
        return repr(self.masked)


def masked(value: Any) -> Any:
    """Return a value of a setting for people, also where it is written as a string."""
    return value.masked if isinstance(value, SecretUrl) else value


def _check_secret_url(url: str) -> SecretUrl:
    return SecretUrl(_check_printable(url))


def _check_printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError
    return value


def _check_host(host: str) -> str:
    if host.startswith("["):  # as in a URL, with which sockets cannot do anything
        raise ValueError
    return _check_printable(host)


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names or not all(map(str.strip, names)):
        raise ValueError
    return tuple(map(_check_printable, names))


def _check_distinct(lists: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any]:
    for name, names in lists.items():
        if not names or len({name, *names}) != 1 + len(names):
            raise ValueError
    return lists


def _check_networks(networks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(ipaddress.ip_network(text)) for text in networks)


def _check_mac(text: str) -> str:
    digits = re.sub("[:-]", "", text).lower()
    if not re.fullmatch("[0-9a-f]{12}", digits) or int(digits, 16) == 0:
        raise ValueError
    if not re.fullmatch("([^:-]{2}([:-])?)([^:-]{2}[:-]?)*[^:-]{2}", text):
        raise ValueError
    if int(digits[:2], 16) & 1:  # of a group, or the broadcast address
        raise ValueError
    return ":".join(digits[n : n + 2] for n in range(0, 12, 2))


def _check_places(places: tuple[str, ...]) -> tuple[str, ...]:
    if not places:
        raise ValueError
    for place in places:
        host, _, port = place.partition(":")
        ipaddress.IPv4Address(host)
        if int(port or 9) not in range(1, 65_536):
            raise ValueError
    return places


def host_and_port(address: str) -> tuple[str, int]:
    """Take an address to listen on apart, such as `[::1]:9464`; 0 is any free port.

    Raises:
        ValueError: it is not one.
    """
    found = re.fullmatch(r"(?:\[([\da-fA-F:.%\w]+)\]|([\w.-]+)):(\d{1,5})", address)
    if found is None or int(found[3]) > 65_535:
        raise ValueError
    if found[1]:
        ipaddress.IPv6Address(found[1])
    return found[1] or found[2], int(found[3])


def split_url(url: str) -> tuple[SplitResult, int | None]:
    """Take a URL apart; the second value is its port, if it has one.

    Raises:
        ValueError: there is no way to read it; the text is for an error.
    """
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise ValueError(f"malformed: {exc}") from exc
    try:
        return parts, parts.port
    except ValueError as exc:
        text = "the port must be a number in the range from 1 to 65535"
        raise ValueError(f"{text}, and an IPv6 address in brackets") from exc


def _check_listen(addresses: tuple[str, ...]) -> tuple[str, ...]:
    for address in addresses:
        host_and_port(address)
    if len(set(addresses)) < len(addresses):
        raise ValueError
    return addresses


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Check web origins (RFC 6454, 6.1: scheme, host and port, and no path).

    Desktop apps and browser extensions have their own schemes.
    """
    return tuple(map(_normalize_origin, origins))


def _normalize_origin(text: str) -> str:
    """Spell an origin as browsers do, since the two are compared byte by byte."""
    match = _ORIGIN.fullmatch(text)
    if match is None or int(match["port"] or 1) not in range(1, 65_536):
        raise ValueError
    scheme, host, port = match.groups()
    if scheme in _DEFAULT_PORTS and _HOST.fullmatch(host) is None:
        raise ValueError
    if port is None or int(port) == _DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}"  # browsers omit the default (RFC 6454, 6.2)
    return f"{scheme}://{host}:{int(port)}"


_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[A-Za-z0-9._~-]+|\[[0-9a-f:]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
# Browsers write host names in lower case, but leave other schemes as they are.
_HOST = re.compile(r"[a-z0-9.-]+|\[[0-9a-f:]+\]")
_DEFAULT_PORTS = {"http": 80, "https": 443}

# --- Types ------------------------------------------------------------------------

Word = Annotated[str, Meta(min_length=1)]
Text = Annotated[str, other("text on one line", _check_printable)]
Host = Annotated[
    str, other("text on one line, an IPv6 address without brackets", _check_host)
]
StoreUrl = Annotated[
    str,
    other(
        "a URL such as redis://host:6379 or unix:///path/of/socket",
        _check_secret_url,
        secret=True,
    ),
]
Prefix = Annotated[
    str,
    Meta(
        pattern=r"\A[A-Za-z0-9_.-]{1,64}\Z",
        extra={"allowed": "1 to 64 letters, digits, dots, hyphens and underscores"},
    ),
]
Seconds = Annotated[float, seconds()]
Duration = Annotated[float, seconds(0.01)]
Names = Annotated[
    tuple[str, ...],
    other(
        'a list of model names such as ["qwen*"], each on one line',
        _check_names,
        split=False,
    ),
]
Table = Annotated[
    Mapping[Word, Word], other('a table such as { "gpt-4o-mini" = "qwen" }')
]
Lists = Annotated[
    Mapping[Word, tuple[Word, ...]],
    other(
        'a table of lists of other names such as { "big" = ["small"] }', _check_distinct
    ),
]
Origins = Annotated[
    tuple[Word, ...],
    other(
        "a list of origins such as http://localhost:3000 or app://name", _check_origins
    ),
]

Networks = Annotated[
    tuple[Word, ...],
    other("a list of networks such as 10.0.0.0/8 or fd00::/8", _check_networks),
]


Mac = Annotated[str, other("a hardware address such as 00:11:22:aa:bb:cc", _check_mac)]
Places = Annotated[
    tuple[Word, ...],
    other("a list of IPv4 addresses such as 192.168.1.255", _check_places),
]
Listen = Annotated[
    tuple[Word, ...],
    other("a list of addresses such as 127.0.0.1:9464 or [::1]:9464", _check_listen),
]

MAX_PROCESSES = 64
Processes = Annotated[
    int,
    Meta(
        ge=1,
        le=MAX_PROCESSES,
        extra={
            "allowed": f"a whole number from 1 to {MAX_PROCESSES}, or auto",
            "words": {"auto": 0},
        },
    ),
]

# --- Use --------------------------------------------------------------------------


def describe_hint(hint: Any) -> str:
    """Return the allowed values of a declared type."""
    return str(_extra(hint).get("allowed", "true or false"))


def is_secret(hint: Any) -> bool:
    """Return whether a value of a declared type may hold a password."""
    return bool(_extra(hint).get("secret"))


def convert(hint: Any, value: Any) -> Any:
    """Return a value of a declared type.

    Raises:
        ValueError: the value is not allowed.
    """
    extra = _extra(hint)
    if "words" in extra and isinstance(value, str) and value in extra["words"]:
        return extra["words"][value]
    try:
        value = msgspec.convert(_unquote(hint, value, extra), hint)
    except (msgspec.ValidationError, OverflowError) as exc:
        raise ValueError(str(exc)) from exc
    return extra["check"](value) if "check" in extra else value


def _extra(hint: Any) -> Mapping[str, Any]:
    """Return `extra` of the last constraint that has one, as aliases can be nested."""
    found = (each.extra for each in _metadata(hint) if isinstance(each, Meta))
    return next((extra for extra in reversed([*found]) if extra), {})


def _metadata(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def parse_span(text: str) -> int | None:
    """Return the seconds of a time such as 45s, 90m, 12h or 30d; None if it is none."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    return int(match[1]) * _SPANS[match[2]] if match else None


_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_FLAGS = dict.fromkeys(("true", "1", "yes", "on"), True)
_FLAGS |= dict.fromkeys(("false", "0", "no", "off"), False)
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def _unquote(hint: Any, value: Any, extra: Mapping[str, Any]) -> Any:
    """Read a string as the type that it stands for; anything else is left as it is."""
    unit = extra.get("unit")
    kind = hint.__origin__ if _metadata(hint) else hint
    kind, args = get_origin(kind) or kind, get_args(kind)
    if kind is Mapping:
        if isinstance(value, str):
            pairs = [part.partition("=") for part in value.split(",") if part.strip()]
            value = {name.strip(): rest.strip() for name, _, rest in pairs}
            if get_origin(args[1]) is tuple:  # "a=b|c,d=b"
                value = {k: re.split(r"\s*\|\s*", v) for k, v in value.items()}
        if isinstance(value, dict):
            value = {name: _unquote(args[1], each, {}) for name, each in value.items()}
    elif kind is tuple and isinstance(value, str) and extra.get("split", True):
        value = [word for word in re.split(r"[,\s]+", value) if word]
    elif kind is int and isinstance(value, float) and value.is_integer() and not unit:
        value = int(value)
    elif not isinstance(value, str) or kind is str:
        pass
    elif kind is bool:
        value = _FLAGS.get(value.lower(), value)
    elif unit:
        match = re.fullmatch(r"(\d{1,15})\s*([A-Za-z]*)", value.strip())
        if match and match[2].upper() in _UNITS:
            value = int(match[1]) * _UNITS[match[2].upper()]
    elif kind in (int, float):
        value = kind(value)
    return value


# --- Names of models, and patterns of them ----------------------------------------


class Aliases:
    """A table of names and shell-like patterns, each with the model it stands for.

    An exact name takes precedence over all patterns.  Of the patterns that match a
    name, the longest counts; of two with the same length, the first.
    """

    __slots__ = ("_patterns", "_table")

    def __init__(self, table: Mapping[str, str]) -> None:
        self._table = dict(table)
        patterns = [key for key in self._table if not is_plain(key)]
        self._patterns = tuple(sorted(patterns, key=len, reverse=True))

    def __repr__(self) -> str:
        return f"<Aliases {self._table}>"

    def __getitem__(self, key: str) -> str:
        """Return the model that a key of the table stands for."""
        return self._table[key]

    @property
    def names(self) -> dict[str, str]:
        """The names without the patterns, and the models that they stand for."""
        return {key: model for key, model in self._table.items() if is_name(key)}

    def __contains__(self, name: str) -> bool:
        """Return whether the table has this exact name."""
        return name in self._table

    def key(self, name: str) -> str | None:
        """Return the key of a name: itself, or else a pattern that matches it."""
        return name if name in self._table else self.pattern(name)

    def pattern(self, name: str) -> str | None:
        """Return the pattern that counts for a name, if one matches."""
        return next((each for each in self._patterns if matches(name, (each,))), None)

    def way(self, key: str) -> list[str]:
        """Follow a key to its model, and on while that is another alias.

        A correct alias has two names, as aliases are followed only once.  A pattern
        that also matches the key itself is not another step: beside `"*" = "qwen"`,
        `fast` may still stand for `llama`.
        """
        names = [key, self._table[key]]
        while names[-1] not in names[:-1]:
            found = self.key(names[-1])
            if found is None or found == key or matches(key, (found,)):
                break
            names.append(self._table[found])
            key = found
        return names


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name matches one of these shell-like patterns.

    Names of models may contain brackets (`claude[1m]`), so a bracket in a pattern also
    stands for itself: `x[1m]*` matches `x[1m]-fast` as well as `x1-fast`.
    """
    for pattern in patterns:
        if fnmatchcase(name, pattern):
            return True
        if "[" in pattern and fnmatchcase(name, pattern.replace("[", "[[]")):
            return True
    return False


def is_plain(name: str) -> bool:
    """Return whether this is a name, and not a pattern."""
    return not any(sign in name for sign in "*?[")


def is_name(key: str) -> bool:
    """Return whether a client may use this as the name of a model.

    Unlike asterisks and question marks, brackets are allowed in names.
    """
    return not any(sign in key for sign in "*?")

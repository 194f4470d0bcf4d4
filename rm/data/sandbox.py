"""The sandbox in which chat templates run: they come with models, and a model may come from anybody.

Jinja's own sandbox keeps a template from files, from attributes that begin with an underscore, and from changing its
input. This one also bounds its time and its memory, without a process of its own, which would cost more than most
templates do:

*Time.* Every round of a loop, every call and every filter looks at the thread's CPU time; behind SECONDS the template
is given up. Nothing between two looks takes long, since texts are bounded.

*Memory.* What makes a text or list longer (`~ + * % join replace center ...`) is computed only if the result has at
most LONGEST characters or elements; so is all that the template writes. Of many such texts the sum is bounded: a
template by which the process has grown by more than MEMORY is given up, too.
"""

import re
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError

SECONDS = 5.0  # of CPU time, for a dialogue: a thousand times what one of 100,000 messages takes
LONGEST = 10**8  # characters of a text, or elements of a list
MEMORY = 2 * 2**30  # bytes by which the process may grow
MEASURED_EVERY = 10**7  # characters that a template makes
LARGEST = 10**4  # of a number that says how wide or how often, as of center(80)
WIDTH = re.compile(r"[0-9]{5,}")  # in a text that formats values
SIZED = (
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "indent",
    "wordwrap",
    "truncate",
    "tojson",
    "batch",
    "slice",
)
SPLITTING = (
    "list",
    "sort",
    "slice",
    "groupby",
    "split",
    "rsplit",
    "splitlines",
    "wordcount",
    "wordwrap",
    "urlize",
    "title",
)
NESTED = ("tojson", "string", "join", "pprint", "list", "urlencode", "xmlattr", "sum", "e", "escape", "forceescape")


class _Used(threading.local):
    """Of each thread, since a server renders in several: until when a template may run, by CPU time; when to look at
    that, by the time of day; the characters that it has made, at how many to measure the memory of the process, and
    how much that may be."""

    end = look_again = measured_next = float("inf")
    made, most = 0, None


class OutOfTime(SecurityError):
    """A template whose time is over."""


_used = _Used()


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An environment whose templates end, and need a bounded memory. `limited` starts the clock."""

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self, **options):
        super().__init__(finalize=_checked, **options)
        self.globals.pop("lipsum")  # random words
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.concat = self._joined  # what a template, a macro or a block writes, in pieces

    def limited(self, template: jinja2.Template, variables: dict) -> str:
        """A template's output.

        Raises:
            Exception: of any kind, as a program may.
        """
        _used.end = time.thread_time() + SECONDS
        _used.look_again = time.monotonic() + SECONDS
        _used.made, _used.measured_next, _used.most = 0, MEASURED_EVERY, None
        return template.render(variables)

    def look(self, *_) -> None:
        """Give the template up if its time is over."""
        if time.monotonic() < _used.look_again:  # read in a tenth of the time that the other clock takes
            return
        if time.thread_time() > _used.end:
            raise OutOfTime(f"takes more than {SECONDS:g} s for a dialogue")

    def counted(self, values: Iterable) -> "_Counted":
        return _Counted(values, self.look)

    def sliced(self, value):
        """A part of a text or list, which is a copy."""
        _check(_length(value))
        return value

    def joined(self, *values) -> str:
        """The texts of some values in one: the operator ~."""
        return self._joined(map(self._text, values))

    def _parse(self, source: str, name, filename) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            if loop.recursive:
                raise jinja2.TemplateSyntaxError("recursive loops are not implemented", loop.lineno, name, filename)
            loop.iter = _call("counted", [loop.iter], loop.lineno)
        _replace(template, nodes.Concat, lambda node: _call("joined", node.nodes, node.lineno))
        _replace(template, nodes.Getitem, _counted_if_sliced)
        return template

    def call_binop(self, context, operator: str, left, right):
        if operator == "+" and type(left) is str and type(right) is str:
            _check(len(left) + len(right))
            return left + right
        if operator == "+" and not isinstance(left, int | float):
            _check(_length(left) + _length(right))
        elif operator == "*":
            _check(max(_length(left), 1) * abs(right) if isinstance(right, int) and _length(left) else 0)
            _check(max(_length(right), 1) * abs(left) if isinstance(left, int) and _length(right) else 0)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            _check(bits * 10**4)  # a number of ten thousand bits at most
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj, attr: str, value) -> bool:
        return attr not in ("encode", "to_bytes", "translate") and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: B902
        """As in Jinja: its names cannot be those of arguments."""
        __self.look()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            __self._check_text(name, owner, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value) -> Callable | None:
        """What the methods format and format_map of a text are replaced by."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args, **kwargs) -> str:
            self._check_format(value.__self__, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return bounded

    def add_filter(self, name: str, function: Callable) -> None:
        position = 1 if hasattr(function, "jinja_pass_arg") else 0  # behind Jinja's context

        @wraps(function)
        def bounded(*args, **kwargs):
            self.look()
            value, more = args[position], args[position + 1 :]
            if name in NESTED and not isinstance(value, str):
                _check(_size(value))
            self._check_text(name, value, more, kwargs)
            return function(*args, **kwargs)

        self.filters[name] = bounded

    def _check_text(self, name: str, value, args: tuple, kwargs: dict) -> None:
        """Refuse a filter, or a method of a text, whose result would be too long."""
        _check(_length(value))  # most make a text of that length
        if name in SPLITTING and isinstance(value, str):
            separator = next((one for one in args if isinstance(one, str)), "") if name.endswith("split") else ""
            _check(10 * (value.count(separator) if separator else len(value)))  # a text has some 70 bytes of its own
        numbers = [abs(n) for n in (*args, *kwargs.values()) if isinstance(n, int)]
        if name in SIZED and max(numbers, default=0) > LARGEST:
            raise SecurityError(f"{name}({max(numbers)}): at most {LARGEST:,}")
        if name == "indent" and isinstance(value, str):
            _check(len(value) + value.count("\n") * max(numbers, default=4))
        elif name == "replace" and isinstance(value, str) and len(args) >= 2:
            old, new = map(str, args[:2])
            _check(len(value) + value.count(old) * len(new))
        elif name == "join":
            between = args[0] if args and not isinstance(value, str) else value
            parts = (args[0] if args else ()) if isinstance(value, str) else value
            _check(_size(parts) + _length(between) * (_length(parts) or 1))
        elif name == "wordwrap":  # puts a text between the lines, each of which may be a character
            between = next((one for one in (*args, *kwargs.values()) if isinstance(one, str)), "")
            _check(_length(value) * max(1, len(between)))
        elif name == "format":
            self._check_format(str(value), (*args, *kwargs.values()))

    def _check_format(self, text: str, values: tuple) -> None:
        if WIDTH.search(text) or any(isinstance(n, int) and abs(n) > LARGEST and "*" in text for n in values):
            raise SecurityError(f"a width of more than {LARGEST:,} characters")
        _check(len(text) + (text.count("%") + text.count("{")) * max((_size(value) for value in values), default=0))

    def _text(self, value) -> str:
        if not isinstance(value, str):
            _check(_size(value))
        return str(value)

    def _joined(self, pieces: Iterable[str]) -> str:
        found, length = [], 0
        for piece in pieces:
            length += len(piece)
            _check(length)
            found.append(piece)
        return "".join(found)


class _Counted:
    """The values of a loop, with a look at the clock before each."""

    def __init__(self, values: Iterable, look: Callable[[], None]):
        self.values, self.look = values, look
        iter(values)  # the error of what cannot be looped over is Python's own

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator:
        for value in self.values:
            self.look()
            yield value


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method)
    return nodes.Call(function, arguments, [], None, None).set_lineno(line)


def _counted_if_sliced(node: nodes.Getitem) -> nodes.Expr:
    return _call("sliced", [node], node.lineno) if isinstance(node.arg, nodes.Slice) else node


def _replace(node: nodes.Node, kind: type[nodes.Node], replacement: Callable[[nodes.Node], nodes.Node]) -> None:
    """Replace all nodes of a kind below `node`."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            for i, entry in enumerate(value):
                if isinstance(entry, nodes.Node):
                    _replace(entry, kind, replacement)
                    value[i] = replacement(entry) if isinstance(entry, kind) else entry
        elif isinstance(value, nodes.Node):
            _replace(value, kind, replacement)
            if isinstance(value, kind):
                setattr(node, name, replacement(value))


def _checked(value):
    """A value that a template writes: it is refused if its text would be too long."""
    if isinstance(value, list | tuple | dict):
        _check(_size(value))
    return value


def _check(length: int) -> None:
    if length > LONGEST:
        raise SecurityError(f"it makes a text of more than {LONGEST:,} characters")
    _used.made += length
    if _used.made > _used.measured_next:
        _used.measured_next = _used.made + MEASURED_EVERY
        _check_memory()


def _check_memory() -> None:
    memory = _memory()
    if _used.most is None:
        _used.most = memory + MEMORY
    if memory > _used.most and 8 * _used.made > MEMORY:  # else it is other threads that need it
        raise SecurityError(f"it takes more than {MEMORY / 2**30:g} GiB of memory")


def _memory() -> int:
    """The bytes of memory that this process has; where the system does not tell, the most that it has had."""
    try:
        with open("/proc/self/statm") as sizes:
            return int(sizes.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _length(value) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _size(value, most: int = LONGEST) -> int:
    """The characters that a value is written with at most, or a number above `most`: a list may hold itself twice."""
    size, left = 0, [value]
    while left and size <= most:
        one = left.pop()
        if isinstance(one, str):
            size += len(one)
            continue
        size += 100  # a million values take a tenth of a second here
        if isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            left += one
    return size

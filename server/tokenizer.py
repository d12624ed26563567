"""The checkpoint's tokenizer and chat template: `tokenizers` and a sandboxed Jinja. No torch, no transformers.

    prompt           -> ServerTokenizer.encode                                     -> ids
    messages, tools  -> _Template.render -> text with marks -> encode              -> ids

Who may write a control token. In a raw prompt, anyone. In a chat only the template: the text of an added token inside a
message becomes ordinary text. So that this cannot be talked around, nothing is searched for in the messages. When the
template is compiled, each added token standing in one of its own literals is replaced by a mark (of lone surrogates,
which no valid message holds), except where the literal is only compared with, as in `'</think>' in content`. After
rendering, a mark is a control token and all else is text, however it came together.

One exception: the content of an assistant message is what the model wrote, so added tokens that are not special
(`<think>`, `<tool_call>`: decoding leaves them in the text) stay tokens there. To know them from the same text
elsewhere, the chat is rendered once more with a lone surrogate inside each of the others.

A chat with no added token in it but the template's is encoded from its plain text as ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from engine.config import ModelError, load_json
from engine.sequence import ParameterError
from engine.text import TokenTable

MAX_RENDER_CHARS = 4 * 2**20
MAX_DEPTH = 64  # of nested lists and objects in messages and tools

_MARK = "\udc80"  # MARK id MARK: a control token
_BREAK = "\udc81"  # inside the text of an added token: this is no token
_END = "\udc82"  # where the message to be continued ends
_MARKED = re.compile(f"{_MARK}([0-9]+){_MARK}")
_NOTHING = re.compile("(?!)")

# string methods that look for their arguments; `replace` writes its second
_SEARCHES = frozenset(
    {"startswith", "endswith", "removeprefix", "removesuffix", "strip", "lstrip", "rstrip", "replace"}
    | {"split", "rsplit", "partition", "rpartition", "find", "rfind", "index", "rindex", "count"}
)

Messages = list[dict[str, Any]]  # JSON values


class ServerTokenizer:
    """One checkpoint's tokenizer. Its methods change nothing and may be called from several threads.

    table: the bytes of every id. num_ids: the largest id plus one. eos_token, bos_token, pad_token: their text or None.
    chat_template: the source of the default template or None.
    """

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any], templates: dict[str, str]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.table = TokenTable(tokenizer)
        self.num_ids = len(self.table)
        tokens = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.bos_token, self.eos_token, self.pad_token = (tokens[n] for n in ("bos_token", "eos_token", "pad_token"))
        self.chat_template = templates.get("default")
        self._added = tokenizer.get_added_tokens_decoder()  # by id
        self._ids = {token.content: i for i, token in self._added.items()}
        self._any_added = _alternation(self._ids)
        self._not_special = _alternation(token.content for token in self._added.values() if not token.special)
        full, bare = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        self._prefix, self._suffix = full[:at], full[at + len(bare) :]
        values = {name: token for name, token in tokens.items() if token is not None}
        self._plain = {name: _Template(source, values, None) for name, source in templates.items()}
        self._marking = {name: _Template(source, values, self._mark) for name, source in templates.items()}

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of `text`. parse_special False makes the text of added tokens ordinary text.

        Raises ParameterError("prompt") for text that is not valid Unicode.
        """
        _check_json(text, "prompt")
        if parse_special:
            return self._encode(text, add_special_tokens)
        ids = self._encode_text(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; an id beyond the tokenizer decodes to nothing."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Messages,
        tools: Messages | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """A chat as the text of a prompt, as transformers' `apply_chat_template(tokenize=False)` renders it.

        continue_final_message: the prompt ends inside the last message's content. Raises ParameterError where there is
        no template, where it refuses the messages, and for a text of more than MAX_RENDER_CHARS.
        """
        _check_json(messages, "messages")
        _check_json(tools, "tools")
        options = (enable_thinking, add_generation_prompt, continue_final_message)
        return self._render(self._plain, messages, tools, *options)

    def encode_chat(
        self,
        messages: Messages,
        tools: Messages | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        parse_special_in_content: bool = False,
    ) -> list[int]:
        """A chat as the ids of a prompt; arguments and errors as for `render_chat`.

        parse_special_in_content: the usual behaviour, a control token wherever its text stands.
        """
        _check_json(messages, "messages")
        _check_json(tools, "tools")
        options = (enable_thinking, add_generation_prompt, continue_final_message)
        if parse_special_in_content:
            plain = self._render(self._plain, messages, tools, *options)
            return self._encode(plain, False)
        text = self._render(self._marking, messages, tools, *options)
        plain = _MARKED.sub(lambda m: self._added[int(m[1])].content, text)
        if [self._ids[t] for t in self._any_added.findall(plain)] == [int(i) for i in _MARKED.findall(text)]:
            return self._encode(plain, False)
        if not any(self._not_special.search(t) for m in messages for t in _assistant_texts(m)):
            return self._encode_marked(text, _NOTHING)
        broken = self._render(self._marking, self._break_messages(messages), self._break(tools), *options)
        if broken.replace(_BREAK, "") != text:  # the template took another turn because a string was broken
            return self._encode_marked(text, _NOTHING)
        return self._encode_marked(broken, self._not_special)

    def _render(
        self,
        templates: dict[str, _Template],
        messages: Messages,
        tools: Messages | None,
        enable_thinking: bool | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> str:
        template = templates.get("tool_use" if tools and "tool_use" in templates else "default")
        if template is None:
            raise ParameterError("messages", "this model has no chat template; use /v1/completions")
        if continue_final_message:
            messages = _with_end(messages)
        values = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        text = template.render(values)
        return _cut_at_end(text) if continue_final_message else text

    def _mark(self, literal: str) -> str:
        return self._any_added.sub(lambda m: f"{_MARK}{self._ids[m[0]]}{_MARK}", literal)

    def _break_messages(self, messages: Messages) -> Messages:
        """A copy in which no string holds an added token that is not special, except the content of assistants."""
        broken = []
        for message in messages:
            kept = {"content"} if message.get("role") == "assistant" else set()
            broken.append({k: v if k in kept else self._break(v) for k, v in message.items()})
        return broken

    def _break(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._not_special.sub(lambda m: m[0][0] + _BREAK + m[0][1:], value)
        if isinstance(value, list):
            return [self._break(v) for v in value]
        if isinstance(value, dict):
            return {self._break(k): self._break(v) for k, v in value.items()}
        return value

    def _encode_marked(self, text: str, tokens: re.Pattern[str]) -> list[int]:
        """Ids of a rendered text: its marks and what `tokens` matches are control tokens, the rest is ordinary text."""
        parts = _MARKED.split(tokens.sub(lambda m: self._mark(m[0]), text).replace(_BREAK, ""))
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(int(part))
                continue
            if i > 0 and self._added[int(parts[i - 1])].rstrip:
                part = part.lstrip()
            if i + 1 < len(parts) and self._added[int(parts[i + 1])].lstrip:
                part = part.rstrip()
            ids += self._encode_text(part)
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # as `encode`, which however holds the interpreter lock throughout: a long text would stop every other request
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _encode_text(self, text: str) -> list[int]:
        """Ids of `text` with the added-token table off: normalise, split, merge, as `Tokenizer.encode` does."""
        normalizer, splitter, model = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer, self._tokenizer.model
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        words = [word for word, _ in splitter.pre_tokenize_str(text)] if splitter is not None else [text]
        return [token.id for word in words if word for token in model.tokenize(word)]


def load_tokenizer(folder: str | Path) -> ServerTokenizer:
    """Read `tokenizer.json`, `tokenizer_config.json` and, where present, `chat_template.jinja` of a checkpoint folder.

    Raises ModelError with one line that names the file.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json: is it a model folder?")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises plain Exception for all that can be wrong in the file
        raise ModelError(f"cannot read {path}: {e}") from None
    config = load_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    source, templates = folder / "tokenizer_config.json", config.get("chat_template") or {}
    if (folder / "chat_template.jinja").exists():
        source = folder / "chat_template.jinja"
        templates = source.read_text(encoding="utf-8")
    if isinstance(templates, str):
        templates = {"default": templates}
    elif isinstance(templates, list):
        templates = {t["name"]: t["template"] for t in templates}
    try:
        return ServerTokenizer(tokenizer, config, templates)
    except jinja2.TemplateError as e:
        raise ModelError(f"{source}: the chat template does not compile: {e}") from None


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace()` without underscored attributes, which lead out of the sandbox (as in transformers 5)."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r}")
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks training targets; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Template:
    """A compiled chat template in the environment that transformers gives it (utils/chat_template_utils.py).

    mark is applied to what the template itself writes: its literals and the values of `tokens`.
    """

    def __init__(self, source: str, tokens: dict[str, str], mark: Callable[[str], str] | None) -> None:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        env.filters["tojson"] = _tojson
        env.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
        tree = env.parse(source)
        if mark is not None:
            _mark_literals(tree, mark)
            tokens = {name: mark(token) for name, token in tokens.items()}
        self._template = env.from_string(tree)
        self._tokens = tokens

    def render(self, values: dict[str, Any]) -> str:
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(**self._tokens, documents=None, **values):
                num_chars += len(piece)
                if num_chars > MAX_RENDER_CHARS:
                    raise jinja2.TemplateError(f"the prompt has more than {MAX_RENDER_CHARS} characters")
                pieces.append(piece)
        except Exception as e:  # a template is a program of its own: it can raise anything over messages it cannot use
            reason = str(e).encode(errors="replace").decode()[:300]
            raise ParameterError("messages", f"the chat template cannot render these messages: {reason}") from None
        return "".join(pieces)


def _mark_literals(node: nodes.Node, mark: Callable[[str], str]) -> None:
    """Apply `mark` to every string in a template's tree that it may write out, in place."""
    for field, value in node.iter_fields():
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, nodes.Node) or not _is_written(node, field, index):
                continue
            if isinstance(child, nodes.TemplateData):
                child.data = mark(child.data)
            elif isinstance(child, nodes.Const) and isinstance(child.value, str):
                child.value = mark(child.value)
            else:
                _mark_literals(child, mark)


def _is_written(node: nodes.Node, field: str, index: int) -> bool:
    """Whether child `index` of `field` can reach the output; otherwise it is compared with, looked for or a key."""
    if isinstance(node, nodes.Compare | nodes.Test):
        return False
    if isinstance(node, nodes.If | nodes.CondExpr | nodes.For) and field == "test":
        return False
    if (isinstance(node, nodes.Getitem) and field == "arg") or (isinstance(node, nodes.Pair) and field == "key"):
        return False
    if isinstance(node, nodes.Filter) and field == "args":
        return (node.name, index) not in (("replace", 0), ("trim", 0))
    if isinstance(node, nodes.Call) and field == "args":
        if isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHES:
            return node.node.attr == "replace" and index == 1
        return not (isinstance(node.node, nodes.Name) and node.node.name == "raise_exception")
    return True


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json: a string, an object with `content`, or null."""
    return value.get("content") if isinstance(value, dict) else value


def _alternation(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the leftmost, then longest, of `texts`, as `tokenizers` does; nothing when there are none."""
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or _NOTHING.pattern)


def _check_json(value: Any, param: str) -> None:
    """Raise ParameterError unless every string in a JSON value is valid Unicode and nesting is at most MAX_DEPTH."""
    stack = [(value, 0)]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise ParameterError(param, f"{param} is nested more than {MAX_DEPTH} deep")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as e:
                raise ParameterError(param, f"{param} holds text that is not valid Unicode: {e.reason}") from None
        elif isinstance(value, list):
            stack += [(v, depth + 1) for v in value]
        elif isinstance(value, dict):
            stack += [(v, depth + 1) for item in value.items() for v in item]


def _assistant_texts(message: dict[str, Any]) -> list[str]:
    """The texts of an assistant message's content; none of another's."""
    content = message.get("content") if message.get("role") == "assistant" else None
    if isinstance(content, str):
        return [content]
    return [p["text"] for p in content if isinstance(p.get("text"), str)] if isinstance(content, list) else []


def _with_end(messages: Messages) -> Messages:
    """The messages with _END, and a space to see whether the template trims, after the last one's content."""
    *others, last = messages or [{}]
    content = last.get("content")
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        return [*others, last | {"content": [*content[:-1], content[-1] | {"text": content[-1]["text"] + _END + " "}]}]
    if not isinstance(content, str):
        raise ParameterError("messages", "continue_final_message needs text in the last message's content")
    return [*others, last | {"content": content + _END + " "}]


def _cut_at_end(text: str) -> str:
    text, found, after = text.rpartition(_END)
    if not found:
        raise ParameterError("messages", "the chat template does not write the last message, so it cannot be continued")
    return text if after.startswith(" ") else text.rstrip()

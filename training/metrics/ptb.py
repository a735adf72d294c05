"""Penn Treebank tokens without Java, for the COCO caption scores.

BLEU, ROUGE-L and CIDEr as the DriveLM challenge computes them first pass both sides through Stanford's Java
PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`). This module is a Python tokenizer with the same behaviour.
Its word lists and character tables were observed by feeding the Java program words and characters one by one, and the
tests compare the two token for token where Java is present.

It is a longest-match scanner: at each position every rule of `_RULES` proposes a token; the one that looks furthest
wins (what it looks ahead counts), the earlier rule wins ties.

Known difference: letters that Unicode gained after the Java program's tables were made (version 6).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import regex

# Tokens that the COCO caption code removes before it counts n-grams. The brackets are listed in capitals although
# tokens are lower-cased by then, so brackets in fact stay; kept, because the official scores depend on it.
COCO_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# Characters that end a line for the Java program, which cannot tell them from the line feed that separates two texts:
# a text that holds one would shift every later text by one line.
_LINE_ENDS = regex.compile("\r\n|[\n\r\u000b\u000c\u0085\u2028\u2029]")
# The Java program sees two halves of a letter beyond the Basic Multilingual Plane, knows neither and drops both. Half
# a character alone cannot be written to a file.
_HALVES = regex.compile(r"[\ud800-\udfff]|(?=[\U00010000-\U0010ffff])[\p{L}\p{M}\p{Nd}]")
_DROPPED = "\u0001"

# Characters ----------------------------------------------------------------------------------------------------------

_SPACES = " \t\u00a0\u2000-\u200a\u3000"
_BLANK = f"[{_SPACES}\n]"  # a space or the end of this text
_DIGIT = r"\p{Nd}"
_ASCII = "[A-Za-z0-9]"
_ALNUM = r"[\p{L}\p{Nd}]"
# Combining marks and signs that continue a word.
_MARKS = (
    "\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0378-\u0379\u0384-\u0385\u03f6"
    "\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf\u05c1-\u05c2\u05c4-\u05c5\u05c7\u0615-\u061a\u064b-\u065e"
    "\u0670\u06d6-\u06e4\u06e7-\u06ed\u06fd-\u06fe\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3"
    "\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962-\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7-\u09c8"
    "\u09cb-\u09cd\u09d7\u09e2-\u09e3\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82"
    "\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31"
    "\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u1885-\u1886"
)
# Symbols that are one token each; those that repeat are below.
_SYMBOLS = (
    "\u0024-\u0026\u002b-\u002c\u002f\u003a-\u003b\u003d\u005e\u007c\u007e\u00a1\u00a5-\u00a9\u00ac"
    "\u00ae-\u00b1\u00b4\u00b6-\u00b8\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3-\u05f4"
    "\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e-\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8"
    "\u0964-\u0965\u0e3f\u0e4f\u1fbd\u2016-\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044"
    "\u207a-\u207e\u208a-\u208e\u20a4\u2100-\u214f\u2190-\u2bff\u3001-\u3002\u3012\u30fb\uff01-\uff0f"
    "\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0-\uffe1\uffe5-\uffe6"
)
_LETTER = rf"(?:[\p{{L}}{_MARKS}\u00ad]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_APOSTROPHE = "(?:['\u0092\u2019]|(?i:&apos;))"
_ANY_APOSTROPHE = f"(?:{_APOSTROPHE}|[`\u0091\u2018\u201b])"
_PAUSE = "[,;:\u3001]"
_URL_STOP = r" \t\n\f\r\"<>|.!?(){},"

# Word lists, in any case unless said otherwise -----------------------------------------------------------------------

# Before a capital or at the end of everything these end a sentence: their full stop is a token of its own as well.
_ENDING_ABBREVIATIONS = """
    al assn bancorp bhd bldg blvd bros co corp cos esq est etc ext inc intl jr ltd plc rd
    rt seq sq sr sys tel univ apr aug dec feb fri jan jul jun mar mon nov oct sep sept thu thurs tue tues wed ala ariz
    calif colo conn ct dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo
""".split()
_ENDING_CAPITALISED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()  # states that are words in small letters
_OTHER_ABBREVIATIONS = """
    adj adm adv alex asst assoc atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen gov
    govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs pvt rep
    reps rev sen sens sfc sgt spc st ste supt supts treas vs wm
""".split()
_NUMBERED_ABBREVIATIONS = "art arts bldg ca fig figs no nos op pp prop".split()  # only before a number
# After an acronym these begin a new sentence; capital first.
_SENTENCE_OPENERS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. Now
    Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
""".split()
_FILE_ENDINGS = """
    bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql
    tar txt wav x xml zip
""".split()
_SPLIT_BEFORE_TWO = "gonna gotta gimme lemme wanna".split()  # gon na
_SPLIT_BEFORE_THREE = "cannot".split()
_KEEP_APOSTROPHE = "li'l nat'l ev'ry e'er c'mon s'mores nor'easter cont'd\\. cont'd".split()


def _any_of(words: Sequence[str]) -> str:
    """Alternatives, longest first, so that the first that matches is the longest."""
    return "|".join(sorted((word.replace(".", r"\.") for word in words), key=len, reverse=True))


def _any_capitalised(words: Sequence[str]) -> str:
    """The same, where the first letter must be a capital and the others may be."""
    return "|".join(f"{word[0]}(?i:{_any_of([word[1:]])})" for word in sorted(words, key=len, reverse=True))


# Pieces --------------------------------------------------------------------------------------------------------------

_WORD = rf"{_LETTER}(?:{_LETTER}|{_DIGIT})*(?:[.!?]{_LETTER}(?:{_LETTER}|{_DIGIT})*)*"
_NUMBER = rf"(?:{_DIGIT}+(?:[.:,\u00ad\u066b\u066c]{_DIGIT}+)*|(?:[.:,\u00ad\u066b\u066c]{_DIGIT}+)+)"
_CLITIC = f"{_APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"  # it's, we'll
_NOT = f"(?i:n){_ANY_APOSTROPHE}(?i:t)"  # the end of don't
_NAME_PREFIX = f"(?:[dDlLoO]{_ANY_APOSTROPHE}{_ALNUM})?"  # d'Artagnan, O'Brien
_COMPOUND = f"{_NAME_PREFIX}{_ALNUM}+(?:[-_\u058a\u2010\u2011]{_NAME_PREFIX}{_ALNUM}+)*"

_COUNTRY_US = r"(?i:(?:Canada|EU|Japan|Korean|non|Sino)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R))"
_ACRONYM = rf"(?:{_COUNTRY_US}|[A-Za-z](?:\.[A-Za-z])*)"
_HYPHENATED = rf"{_ASCII}[A-Za-z0-9.,\u00ad]*(?:-(?:(?:{_COUNTRY_US}|[A-Za-z](?:\.[A-Za-z])+)\.|[A-Za-z0-9\u00ad]+))+"
_SLASH_PART = rf"{_ASCII}+(?:-[A-Za-z]+){{0,2}}"
_AMPERSAND_NAME = "[A-Z]+(?:(?:[+&]|(?i:&amp;))[A-Z]+)+"  # AT&T
# The letters in brackets are case-sensitive here: Pty. is an abbreviation, PTY. is not.
_ENDING = (
    rf"(?:(?i:pp?t)[ye][sS]?|(?i:{_any_of(_ENDING_ABBREVIATIONS)})|{_any_capitalised(_ENDING_CAPITALISED)}"
    r"|(?i:Ed|Ph)\.[dD])\."
)
_OTHER = rf"(?:[mM][ft][gG]|(?i:{_any_of(_OTHER_ABBREVIATIONS)})|M(?i:iss)|(?i:a\.k\.a)|{_ACRONYM})"

_MARKUP_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
_MARKUP_ATTRIBUTE = f" +{_MARKUP_NAME}(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?"
_MARKUP = f"<(?:[!?][A-Za-z-][^>\n]*|{_MARKUP_NAME}(?:{_MARKUP_ATTRIBUTE})* */?|/{_MARKUP_NAME}) *>"
_URL_PATH = rf"(?:/[^ \t\n\f\r\"<>|()]+[^{_URL_STOP}-])?"


def _constant(token: str) -> Callable[[str], str]:
    return lambda text: token


def _no_soft_hyphen(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _no_inner_space(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _ampersand(text: str) -> str:
    return regex.sub("(?i:&amp;)", "&", text)


def _round_brackets(text: str) -> str:
    return _no_inner_space(text).replace("(", "-LRB-").replace(")", "-RRB-")


def _dashes(text: str) -> str:
    return "--" if 3 <= len(text) <= 4 else text


def _closing(text: str) -> str:
    """LaTeX quotes: curly ones say which side they are on, straight ones close."""
    text = regex.sub("'|(?i:&apos;)", "'", text)
    text = regex.sub('"|(?i:&quot;)', "''", text)
    for marks, side in _QUOTES_BY_SIDE.items():
        text = regex.sub(f"[{marks}]", side, text)
    return text


_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
_QUOTES_BY_SIDE = {
    "\u0091\u2018\u201b\u2039": "`",
    "\u0092\u2019\u203a": "'",
    "\u0093\u201c\u00ab": "``",
    "\u0094\u201d\u00bb": "''",
}
# One character, another token: fractions and currencies.
_REWRITTEN = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_REWRITTEN |= {"\u00a2": "cents", "\u00a3": "#", **dict.fromkeys("\u00a4\u0080\u20a0\u20ac", "$")}


@dataclass(frozen=True)
class _Rule:
    token: str  # regular expression
    ahead: str = ""  # what must follow; counts for the longest match, is not part of the token
    write: Callable[[str], str] = str
    give_back: int = 0  # characters at the end of the token that become the next token
    repeat_stop: bool = False  # the full stop at the end belongs to the token and is the next token too


_WORDS = [
    _Rule(f"(?i:{_any_of(_SPLIT_BEFORE_THREE)}|{_APOSTROPHE}twas)", give_back=3),
    _Rule(f"(?i:{_any_of(_SPLIT_BEFORE_TWO)}|{_APOSTROPHE}tis)", give_back=2),
    _Rule(_WORD, ahead=_CLITIC, write=_no_soft_hyphen),
    _Rule("[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", ahead=_NOT, write=_no_soft_hyphen),  # did n't
    _Rule(_WORD, write=_no_soft_hyphen),
    _Rule(rf"{_WORD}\.", ahead=_PAUSE, write=_no_soft_hyphen),
    _Rule("[cC][+][+]|[cCfF]#"),  # C++, F#
]
_APOSTROPHES = [
    _Rule(rf"[A-HJ-XZn]{_ANY_APOSTROPHE}\p{{L}}{{2,}}"),  # O'Clock
    _Rule(rf"\p{{L}}+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z]\p{{L}}*"),  # DeeO'Brien
    _Rule(f"{_APOSTROPHE}(?i:n){_APOSTROPHE}?"),  # rock 'n' roll
    _Rule(f"(?i:dunkin|somethin|ol){_APOSTROPHE}"),
    _Rule(f"{_APOSTROPHE}(?:(?i:em|till?|cause)|[2-9]0(?i:s))"),  # 'em, '90s
    _Rule(f"(?i:{'|'.join(_KEEP_APOSTROPHE)})|(?i:o){_ANY_APOSTROPHE}(?i:o)|(?i:cap{_APOSTROPHE}n|c{_APOSTROPHE}est)"),
    _Rule(f"[lLdDjJ]{_APOSTROPHE}"),  # l' été
    _Rule(f"[yY]{_APOSTROPHE}", ahead=r"\p{L}"),  # y' all
    _Rule(_CLITIC, ahead="[^A-Za-z]", write=_closing),
    _Rule(_NOT, ahead="[^A-Za-z]", write=_closing),
    _Rule(f"{_APOSTROPHE}[0-9][0-9]", ahead=_BLANK),  # in '08
]
_ADDRESSES = [
    _Rule(_MARKUP, write=_no_inner_space),
    _Rule(rf"(?i:https?)://[^ \t\n\f\r\"<>|(){{}}]+[^{_URL_STOP}-]"),
    _Rule(rf"(?i:www)\.(?:[^{_URL_STOP}]+\.)+[a-zA-Z]{{2,4}}{_URL_PATH}"),
    # the range from the comma to the underscore, digits and capitals included, cannot be part of a bare host name
    _Rule(rf"(?:[^ \t\n\f\r\"`'<>|.!?(){{}},-_$]+\.)+(?:com|net|org|edu){_URL_PATH}"),
    _Rule(
        '(?:<|(?i:&lt;))?[a-zA-Z0-9][^ \t\n\f\r"<>|()\u00a0{}]*@(?:[^ \t\n\f\r"<>|(){}.\u00a0]+\\.)*'
        '[^ \t\n\f\r"<>|(){}.\u00a0]+(?:>|(?i:&gt;))?'
    ),
    _Rule(f"@[a-zA-Z_][a-zA-Z_0-9]*|#{_LETTER}+"),
]
_NUMBERS = [
    _Rule(rf"{_DIGIT}{{1,2}}[-/]{_DIGIT}{{1,2}}[-/]{_DIGIT}{{2,4}}"),  # a date
    _Rule(f"[-+]?{_NUMBER}", write=_no_soft_hyphen),
    _Rule("[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    _Rule(rf"(?:{_DIGIT}{{1,4}}[- \u00a0])?{_DIGIT}{{1,4}}(?:\\?/|\u2044){_DIGIT}{{1,4}}", write=_no_inner_space),
    _Rule("[\u2155-\u215e]"),
    _Rule(r"[A-Z]*\$"),  # US$
    # telephone numbers, with separators or with dots
    _Rule(
        r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
        r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
        write=_round_brackets,
    ),
    _Rule(r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"),
]
_ABBREVIATIONS = [
    _Rule(
        rf"{_ACRONYM}\.",
        ahead=f"{_BLANK}+(?:{_any_capitalised(_SENTENCE_OPENERS)}|{_MARKUP}){_BLANK}",
        repeat_stop=True,
    ),
    _Rule(rf"(?i:{_any_of(_NUMBERED_ABBREVIATIONS)})\.", ahead=f"{_BLANK}?{_DIGIT}"),
    _Rule(r"(?i:pt[ey]|co)\.", ahead=f"[{_SPACES}](?i:ltd|lim)"),
    _Rule(_ENDING, ahead=f"{_BLANK}(?:{_BLANK}|[A-Z]|{_MARKUP})", repeat_stop=True),
    _Rule(_ENDING, ahead=r"[\s\S][\s\S]"),
    _Rule(_ENDING, repeat_stop=True),
    _Rule(rf"{_OTHER}\."),
    _Rule(_OTHER, ahead=f"[{_SPACES}]"),
    _Rule(_ACRONYM, ahead=_BLANK),
]
_JOINED_WORDS = [
    _Rule(rf"{_ALNUM}+(?:\.{_ALNUM}+)*\.(?i:{_any_of(_FILE_ENDINGS)})", ahead=f"(?:{_BLANK}|[.?!,])"),
    _Rule(rf"{_SLASH_PART}(?:\\?/{_SLASH_PART}){{1,2}}"),  # and/or
    _Rule("(?i:pro|anti)-"),
    _Rule(rf"{_HYPHENATED}\.", ahead=_PAUSE, write=_no_soft_hyphen),
    _Rule(_HYPHENATED, write=_no_soft_hyphen),
    _Rule(rf"{_COMPOUND}\.", ahead=_PAUSE),
    _Rule(_COMPOUND),
    _Rule(rf"{_AMPERSAND_NAME}\.", ahead=_PAUSE, write=_ampersand),
    _Rule(_AMPERSAND_NAME, write=_ampersand),
]
_FACES = [
    _Rule(r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", ahead="[^A-Za-z0-9]", write=_round_brackets),  # :-)
    _Rule(r"[-\^x=~<>']_[-\^x=~<>']", write=_round_brackets),  # ^_^
    _Rule(r"\((?:[-\^x=~<>'][_.]?[-\^x=~<>']|[\^x=~<>']-[\^x=~<>'`])\)", write=_round_brackets),
]
_QUOTATION_MARKS = [
    _Rule('"|(?i:&quot;)', ahead="[A-Za-z0-9$]", write=_constant("``")),
    _Rule('"|(?i:&quot;)', write=_constant("''")),
    _Rule("''"),
    _Rule("'", ahead=f"[A-Za-z][^{_SPACES}\n]", write=_constant("`")),
    _Rule("[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{1,2}", write=_closing),
    _Rule(_APOSTROPHE, write=_closing),
    _Rule(_CLITIC, write=_closing),
    _Rule(_NOT, write=_closing),
]
_PUNCTUATION = [
    _Rule("&(?:MD|md|[mn]dash);|[\u0096\u0097\u2013\u2014\u2015]", write=_constant("--")),
    _Rule("(?i:&amp;)", write=_constant("&")),
    _Rule("&(?:(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq)|#[0-9]+);"),
    _Rule("<|(?i:&lt;)", write=_constant("<")),
    _Rule(">|(?i:&gt;)", write=_constant(">")),
    _Rule(r"[()\[\]{}]", write=lambda text: _BRACKETS[text]),
    _Rule("-+", write=_dashes),
    _Rule("\\.{3,5}|(?:\\.[ \u00a0]){2,4}\\.|[\u0085\u2026]", write=_constant("...")),
    _Rule("@+|#+|_+|[?!]+|<<|>>"),
    _Rule(r"\*+|(?:\\\*){1,3}"),
    _Rule(r"\."),
    _Rule(f"[{''.join(_REWRITTEN)}]", write=lambda text: _REWRITTEN[text]),
    _Rule(rf"(?=\P{{L}})[{_SYMBOLS}\\]"),
]
_RULES = [*_WORDS, *_APOSTROPHES, *_ADDRESSES, *_NUMBERS, *_ABBREVIATIONS, *_JOINED_WORDS, *_QUOTATION_MARKS]
_RULES += [*_FACES, *_PUNCTUATION]
_COMPILED = [(regex.compile(f"(?P<token>{rule.token})(?:{rule.ahead})"), rule) for rule in _RULES]
_SKIPPED = regex.compile(f"(?:[\\x00{_SPACES}\u200b\u200e\u200f\ufeff\\x7f]|(?i:&nbsp;))+")
# Most of an answer: a plain word before a space, which only the assimilations split.
_PLAIN_WORD = regex.compile("([A-Za-z]+)(?= )")
_SPLIT = frozenset([*_SPLIT_BEFORE_TWO, *_SPLIT_BEFORE_THREE])


def one_line(text: str) -> str:
    """`text` as one line that both tokenizers can read: line ends become spaces."""
    return _HALVES.sub(_DROPPED, _LINE_ENDS.sub(" ", text))


def _tokens(text: str) -> Iterator[str]:
    position = 0
    while position < len(text):
        if text[position] == "\n":
            yield "\n"
            position += 1
            continue
        if skipped := _SKIPPED.match(text, position):
            position = skipped.end()
            continue
        plain = _PLAIN_WORD.match(text, position)
        if plain and plain[1].lower() not in _SPLIT:
            yield plain[1]
            position = plain.end()
            continue
        best, best_rule = None, None
        for pattern, rule in _COMPILED:
            match = pattern.match(text, position)
            if match and (best is None or match.end() > best.end()):
                best, best_rule = match, rule
        if best is None or best_rule is None:
            position += 1  # a character that no rule knows is dropped, as the Java program does
            continue
        token, position = best["token"], best.end("token") - best_rule.give_back
        if best_rule.give_back:
            token = token[: -best_rule.give_back]
        if best_rule.repeat_stop:
            position -= 1
            if len(token) == 2:  # "A." at the end of a sentence is "A" and a full stop
                token = token[:-1]
        yield best_rule.write(token)


def ptb_tokenize(texts: Sequence[str]) -> list[list[str]]:
    """The Penn Treebank tokens of each text, lower-cased, punctuation included.

    The texts are scanned as one document with a text per line, as the COCO caption code does: whether "etc." ends a
    sentence depends on what follows it, and at the end of a text that is the next text.
    """
    lines: list[list[str]] = [[]]
    for token in _tokens("\n".join(one_line(text) for text in texts)):
        if token == "\n":
            lines.append([])
        else:
            lines[-1].append(token.lower())
    return lines[: len(texts)]

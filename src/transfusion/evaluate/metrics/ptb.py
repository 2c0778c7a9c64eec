"""The words of a caption as the evaluation of COCO captions counts them (Chen et al., 2015, arXiv:1504.00325).

That evaluation cuts captions by Stanford's Penn Treebank tokenizer, puts them in lower case and removes punctuation.
This is a lexer of our own that cuts them in the same places as the one of pycocoevalcap 1.2, which is CoreNLP 3.4.1.
At each place the longest match counts, and of equally long ones the first rule. Published figures rest on the habits of
that tokenizer, so they are kept:

- Brackets stay, as `-lrb-` and the like. So do runs of marks, such as `?!`.
- A full stop stays with an abbreviation, and with any word before a comma, semicolon or colon.
- Characters beyond U+FFFF, such as emoji, are left out.

Two things differ. Java reads all captions as one text, where a few captions end differently by what begins the next
one. Here each stands alone. Soft hyphens are left out before anything is cut.
"""

# ruff: noqa: RUF001 - captions have all kinds of quotes and dashes

from __future__ import annotations

import re
from functools import cache

# Rules read the shape of a caption: a letter, mark, digit or symbol beyond ASCII is one character for all of its kind.
_LETTER, _MARK, _DIGIT, _SYMBOL, _NOTHING = "é", "\u0301", "٠", "§", "\0"
_KEPT = frozenset(
    "‘’‚‛“”„‟‹›«»\x91\x92\x93\x94¢£¤¥\x80₠€¼½¾⅓⅔⁄…、\u058a\u2010\u2011–—―\x96\x97²³¹⁰⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉₊₋"
)
_SPACES = frozenset("\t\n\x0b\x0c\r\x85\xa0\u2028\u2029\u3000").union(map(chr, range(0x2000, 0x200B)))
_MARKS = re.compile(
    "[\u02c2-\u02ff\u0300-\u036f\u0375\u0384\u0385\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf-\u05c2\u05c4-\u05c7"
    "\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06ed\u06fd\u06fe\u070f-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0955"
    "\u0962-\u0963\u0981-\u0983\u09bc-\u09e3\u0a01-\u0a03\u0a3c-\u0a4f\u0a81-\u0a83\u0abc-\u0acf\u0b82\u0bbe-\u0bcd"
    "\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d48\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ebc\u0ec8-\u0ecd]"
)
_SYMBOLS = re.compile(
    "[\xa1-\xa9\xac-\xbf×÷\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u060c\u0614\u061b\u061e\u061f"
    "\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038"
    "\u203b\u203e-\u2042\u207c-\u207e\u208c-\u208e\u20a4\u2100-\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6]"
)
_WRITTEN = str.maketrans(
    {
        **{
            "(": "-lrb-",
            ")": "-rrb-",
            "¼": "1/4",
            "½": "1/2",
            "¾": "3/4",
            "⅓": "1/3",
            "⅔": "2/3",
            "¢": "cents",
            "£": "#",
            "…": "...",
        },
        **dict.fromkeys("€¤₠\x80", "$"),
        **dict.fromkeys("–—―\x96\x97", "--"),
        **dict.fromkeys("“«\x93", "``"),
        **dict.fromkeys('”»\x94"', "''"),
        **dict.fromkeys("‘‹\x91‛", "`"),
        **dict.fromkeys("’›\x92", "'"),
    }
)
_ALONE = {
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **dict.fromkeys(["&quot;", "&nbsp;", "&mdash;", "&ndash;", "&md;"], "."),
}
# What is removed, as far as the tokenizer writes it so. Unlike the brackets there, it has no small letters in it.
_PUNCTUATION = re.compile(r"''?|``?|[.?!,:;]|-{1,4}|\.[.\xa0]+")

_TAG = (
    r"<(?:[!?][A-Za-z\-][^>]*|/[A-Za-z][A-Za-z0-9_:.\-]* *|[A-Za-z][A-Za-z0-9_:.\-]*"
    r"(?: +[A-Za-z][A-Za-z0-9_:.\-]*(?: *= *(?:'[^']*'|\"[^\"]*\"))?)* */? *)>"
)
_L = r"(?:[A-Za-zé\u0301]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_LD = rf"(?:{_L}|\d)"
_APOSTROPHE, _APOSTROPHES = r"(?:['’\x92]|&apos;)", r"(?:['’\x92`‘\x91‛]|&apos;)"
_WORD = rf"{_L}{_LD}*(?:[.!?]{_L}{_LD}*)*"
_CLITIC = rf"{_APOSTROPHE}(?i:re|ve|ll|[msd])"
_NOT = rf"[nN]{_APOSTROPHES}[tT]"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+|(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-U\.(?:K|S\.S\.R)"
_HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:(?:{_ACRONYM})\.|[A-Za-z0-9]+))+"
_CAPITALS = r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
_PART = rf"(?:[dDoOlL]{_APOSTROPHES}[A-Za-zé\d])?[A-Za-zé\d]+"
_THING = rf"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"
_WEB, _WEB_END = r'[^ "<>|(){}]', r'[^ "<>|.!?(){},\-]'
_SITE = (
    r'(?:(?i:www)\.(?:[^ "<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|(?:[^ "`\'<>|!?(){},-_$]+\.)+(?:com|net|org|edu))'
)
_FACE = r"[\-^x=~<>']"
# Some of these are abbreviations in any case, some only behind a capital, some not in capitals.
_ABBREVIATION = (
    r"(?:(?i:ala|al|apr|ariz|assn|aug|bancorp|bhd|bldg|blvd|bros|calif|colo|conn|corp|cos?|ct|dak|dec|(?:ph|ed)\.d|esq"
    r"|est|etc|ext|feb|fla|fri|ga|inc|ind|intl|jan|jr|jul|jun|kans?|ky|ltd|mar|md|mich|minn|mon|mont|mo|neb|nev|nov|oct"
    r"|okla|penn|plc|rd|rt|sept?|seq|sq|sr|sys|tel|tenn|thurs?|thu|tues?|univ|va|vt|wed|wisc?|wyo)|[Pp]p?t[ey]s?"
    r"|(?=[ADILMOPTW])(?i:az|ark|del|ill|la|mass|miss|ore|pa|tex|wash))\."
)
_TITLE = (
    r"(?:(?i:adj|adm|adv|alex|assoc|asst|attys?|ave|brig|capt|cf|cie|cmdr|col|comdr|cpl|dept|det|drs?|elec|ens|ft|gen"
    r"|govs?|hon|insp|invt|jos|lieut|lt|maj|messrs|mlle|mme|mrs?|msgr|ms|mt|natl|pfc|ph|pres|profs?|pvt|reps?|rev|sens?"
    r"|sfc|sgt|spc|ste?|supts?|treas|vs|wm)|[Mm][ft]g)\."
)
# Words that begin a sentence behind a single letter, which then is no initial.
_BEGINNING = (
    r"(?=[A-Z])(?i:about|according|additionally|after|an?|as|at|but|earlier|her?|here|however|if|in|it|last|many|more"
    r"|mr\.|ms\.|now|once|one|other|our|she|since|so|some|such|that|the|their|then|there|these|they|this|we|what|when"
    r"|while|yet|you)"
)

# The group of a match is the token. What follows the group is only looked at, but counts for the longest match.
_RULES = (
    r"(?i:(can)not|(gon|wan)na|(got)ta|(lem|gim)me)",
    rf"(?P<raw>{_TAG})",
    r"(&(?i:amp|lt|gt|nbsp|quot|mdash|ndash);|&(?:MD|HT|TL|UR|LR|QC|QL|QR|odq|cdq|#\d+);)",
    rf"({_WORD}){_CLITIC}",
    rf"([A-Za-z]*[A-MO-Za-mo-z]){_NOT}",
    rf"({_WORD})",
    # Words with an apostrophe.
    rf"(?P<raw>{_APOSTROPHE}[nN]{_APOSTROPHE}?|[oO]{_APOSTROPHES}o|[lLdDjJ]{_APOSTROPHE}|{_APOSTROPHE}[2-9]0[sS])",
    rf"(?P<raw>[yY]{_APOSTROPHE})[A-Za-zé]",
    rf"(?P<raw>[A-HJ-XZn]{_APOSTROPHES}[A-Za-zé]{{2,}}|[A-Za-zé]+[aeiouyAEIOUY]{_APOSTROPHES}[aeiouA-Z][A-Za-zé]*)",
    rf"(?P<raw>(?i:(?:dunkin|somethin|ol){_APOSTROPHE}|{_APOSTROPHE}(?:em|till?|cause)|cont{_APOSTROPHE}d\.|cap'n|c'est"
    r"|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l))",
    r"(?i:('t)(?:was|is))",
    # Addresses.
    rf"(?P<raw>(?i:https?)://{_WEB}+{_WEB_END})",
    rf"(?P<raw>{_SITE})",
    rf"(?P<raw>{_SITE}/{_WEB}+{_WEB_END})",
    r'(?P<raw><?[a-zA-Z0-9][^ "<>|(){}]*@(?:[^ "<>|(){}.]+\.)*[^ "<>|(){}.]+>?)',
    rf"(@[a-zA-Z_][a-zA-Z_0-9]*|#{_L}+)",
    rf"({_CLITIC})[^A-Za-z]",
    r"(')[A-Za-z][^ \n]",
    # Numbers.
    r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
    rf"([-+]?{_NUMBER})",
    r"([⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+))",
    r"((?:\d{1,4}[- ])?\d{1,4}(?:\\?/|⁄)\d{1,4}|[¼½¾⅓⅔])",
    r"(?i:(-[lr][rcs]b-|c\.d\.s|pro-|anti-|s(?:&|&amp;)p-500|s(?:&|&amp;)ls))",
    r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})",
    r"([A-Z]*\$|#|[¢£¤¥\x80₠€])",
    # Abbreviations.
    r"(?i:((?:ca|figs?|prop|nos?|art|pp|op)\.) ?\d)",
    r"(?i:(pt[ey]\.) l(?:td|im))",
    rf"([A-Za-z])\. +(?:{_BEGINNING}|{_TAG})[ \n]",
    rf"({_ABBREVIATION})[\s\S]{{0,2}}",
    rf"({_TITLE}|(?:{_ACRONYM}|[A-Za-z])\.)",
    r"(?P<raw>['’]\d\d)[ \n]",
    r"((?:[A-Za-zé\d]+\.)+(?i:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png"
    r"|ppt|ps|py|sql|tar|txt|wav|xml|x|zip))(?:[ \n.?!,])",
    rf"(?P<raw>(?:{_WORD}|{_HYPHENATED}|{_THING}|{_CAPITALS})\.)[,;:、]",
    r"((?:\([0-9]{2,3}\) ?|(?:\+\+?)?(?:[0-9]{2,4}[- ])?[0-9]{2,4}[- ])[0-9]{3,4}[- ]?[0-9]{3,5}"
    r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5})",
    # Faces.
    r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]",
    rf"({_FACE}_{_FACE}|\({_FACE}[_.]?{_FACE}\)|\([\^x=~<>']-[\^x=~<>'`]\))",
    # Signs.
    r"(-+|\.{3,5}|(?:\. ){2,4}\.|@+|#+|_+|\*+|(?:\\\*){1,3}|[?!]+|<<|>>|…)",
    rf"({_HYPHENATED})",
    rf"({_CAPITALS}|(?i:c\+\+)|[CcFf]#)",
    rf"(?P<raw>{_THING})",
    rf"({_CLITIC}|{_NOT})",
    r"(''|&apos;|[`‘’‚‛“”„‹›«»\x91-\x94]{1,2})",
    r"([^ \n\0\u058a\u2010\u2011])",
)


@cache
def _rules() -> list[re.Pattern[str]]:
    return [re.compile(rule) for rule in _RULES]


def ptb_words(caption: str) -> list[str]:
    """The words of a caption: cut, in lower case, without punctuation. None for a caption without words."""
    return " ".join(ptb_tokens(caption)).split()


def ptb_tokens(caption: str) -> list[str]:
    """As `ptb_words`, but what the tokenizer joins by a no-break space, such as `1\\xa01/2`, is one token."""
    text = caption.replace("\xad", "") + "\n"
    shape = "".join(map(_shape, text))
    tokens, place = [], 0
    while place < len(text) - 1:
        matches = [match for rule in _rules() if (match := rule.match(shape, place))]
        if not matches:
            place += 1
            continue
        found = max(matches, key=lambda match: match.end())
        start, end = found.span(found.lastindex or 0)
        token = text[start:end].lower().replace(" ", "\xa0")
        if not found.lastgroup:
            token = _ALONE.get(token) or token.replace("&amp;", "&").replace("&apos;", "'").translate(
                _WRITTEN
            )
        if not _PUNCTUATION.fullmatch(token):
            tokens.append(token)
        place = end
    return tokens


@cache
def _shape(character: str) -> str:
    if character in _SPACES:
        return " "
    if character in _KEPT or " " <= character <= "~":
        return character
    if character > "\uffff":
        return _NOTHING
    if character.isalpha():
        return _LETTER
    if character.isdecimal():
        return _DIGIT
    if _MARKS.match(character):
        return _MARK
    return _SYMBOL if _SYMBOLS.match(character) else _NOTHING

"""Whether ptxas left registers without a value, from a listing of `nvdisasm -c`."""

import re

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s+([^;]*?)\s*;", re.M)


def undefined_registers(listing: str) -> list[str]:
    """The instructions that read a uniform register which no instruction above them writes.

    Above, not before: branches are not followed, so a write that is jumped over counts as one.
    """
    written: set[int] = set()
    found = []
    for operation, operands in INSTRUCTION.findall(listing):
        fields = [field.strip() for field in operands.split(",")]
        # a destination comes first, or behind the one predicate that is set beside it
        place = 1 if re.fullmatch(r"U?P\w", fields[0]) and len(fields) > 1 else 0
        target = re.fullmatch(r"UR(\d+)", fields[place])
        sources = fields[place + 1 :] if target else fields
        read = set().union(*(_read(operation, field, fields) for field in sources))
        # LLVM fills bytes that nobody looks at from registers that nobody writes
        if not read <= written and operation != "UPRMT":
            found.append(f"{operation} {operands}")
        if target:
            bits = re.search(r"\.(64|128|256)\b", operation)
            width = int(bits[1]) // 32 if bits else 2 if ".WIDE" in operation else 1
            written |= _span(target, width)
    return found


def _read(operation: str, field: str, fields: list[str]) -> set[int]:
    """The uniform registers that one operand reads. URZ, which is always zero, has no number."""
    found = re.search(r"\bUR(\d+)", field)
    if not found:
        return set()
    if operation.startswith("HGMMA"):  # two descriptors in four registers, or the second alone
        return _span(found, 4) if field == fields[1] else _span(found, 2, 2)
    # an address is one register, however wide what it points to
    pair = field.startswith(("desc[", "gdesc["))
    pair |= "[" not in field and re.search(r"\.64\b", operation) is not None
    return _span(found, 2 if pair else 1)


def _span(found: re.Match, count: int, offset: int = 0) -> set[int]:
    first = int(found[1]) + offset
    return set(range(first, first + count))

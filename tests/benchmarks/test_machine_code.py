"""What is read off the machine code is what it says, and the documents have a line of every kernel and GPU."""

from __future__ import annotations

from collections import Counter

import pytest

machine_code = pytest.importorskip("machine_code", exc_type=ImportError)
LISTING = """
 Function kernel:
  REG:40 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:596 TEXTURE:0
\tFunction : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.EF.128.CONSTANT R4, desc[UR6][R2.64] ;    /* 0x0 */
        /*0020*/                   LDG.E.U8 R8, desc[UR6][R2.64] ;
        /*0030*/                   LDG.E R9, desc[UR6][R2.64] ;
        /*0040*/               @P1 LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR6][R2.64] ;
        /*0050*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0060*/              @UP0 UTCHMMA gdesc[UR4], R24 ;
        /*0070*/                   STL [R1], R4 ;
        /*0080*/                   STG.E.64 desc[UR6][R2.64], R4 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   NOP ;
"""


def test_what_is_read_off():
    code = machine_code.code_of(LISTING)
    assert code.registers == 40
    assert code.local == 8 + 16 + 1
    assert code.accesses == Counter(
        {("LDG", 128): 1, ("LDG", 8): 1, ("LDG", 32): 1, ("LDGSTS", 128): 1, ("STG", 64): 1}
    )
    assert code.products == {"HGMMA", "UTCHMMA"}
    assert code.instructions == 10
    assert code.of("LDG") == "1 of 8, 1 of 32, 1 of 128"


@pytest.mark.slow
def test_the_documents_have_a_line_of_every_kernel_and_gpu(root):
    def names(lines):
        return [line.split("|")[1:3] for line in lines]

    text = (root / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    head = machine_code.HEAD.splitlines()
    made = [*machine_code.rows()]
    shown = text[text.index(head[0]) :][: len(head) + len(made) + 1]
    assert shown[-1] == ""
    assert names(shown[len(head) : -1]) == names(made)
    # Nothing is spilled, anywhere.
    assert {line.split("|")[5].strip() for line in (*made, *shown[len(head) : -1])} == {"0"}

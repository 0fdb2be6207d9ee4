"""Tables of the trellis, trained on Gaussian numbers. Written by scripts/make_trellis_tables.py.

Mean squared error on Gaussian numbers in blocks of variance 1:
* 2 bits, 256 states: 0.07654
* 2 bits, 1024 states: 0.07260
* 3 bits, 256 states: 0.02076
* 3 bits, 1024 states: 0.01923
* 4 bits, 256 states: 0.00584
* 4 bits, 1024 states: 0.00508
"""

from __future__ import annotations

import base64
from functools import cache

TABLE_SCALE = 4096  # tables contain multiples of 1 / TABLE_SCALE
TABLE_NUMBER = 1  # of these tables, in config.json of a packed checkpoint

# 16-bit integers, little-endian, in base64, by bits and state_bits.
_TABLES = {
    (2, 8): (
        "OgbJ7NQRqfX7HS4PFwZq+dkJOxi29vb//RB4/ZvvVuHV9OgPZOSVAkoAo/DN3aUMT/8LFZ3yvAMPFyP95O9kBuPwGhJNCGEAzezCCEEk"
        "gvlyFMIFVPxe0w/2cQAX6JUNOvs26EDyWQcEEIUfhfugCvne7O0aEOT//faAE/ADTOQBHA4KaQEe+XznAQBg9JkLtBtB+m7+ZAteBugS"
        "lv8w97EJU+6I+Gj8vgKQ4K7xUxSiAUAM4PKH8DYEqAzi+MMdefxZ7IDvnQv1CUHtTRUwAK36gwJo64j3JBj8CkXdxSqtB90P+f0X9bfv"
        "CvuTJOkHIf8j9T0FhedUCS4CzhWV8lUB3/dTF4wOhg2PHLUriv0W7aD1iAr84ent4vc32OUGjBjB+h0KIQL89pYBhQ5L7KTj0PbcAlQO"
        "le7v4bANTfwwExEEqhlg98PY3vuXAyjsQQdf7rkEhA/6/fP2J+xUB+8iMP3bEHzl5gaEEmny1P1/CQoWY/8B8y0TWPb16bgDA/s5Hobx"
        "hAchBLj0ZP+s6LP5Ngih5pAb5v1b5wQQUPNWBJbmSvW3Es3zRAZbFVr+5u8SA74Pb/fI+v0gyQG0DlAKVfon/q0bOP7I8bMRmAnmAEoQ"
        "C/fv6zcGOgZy+BQYheci/foG9PNT4+gAHQud8ibxM/9PGwMLpwte/4Hvzvg="
    ),
    (2, 10): (
        "Yuvb/Rb3vxxbC2/pyiTY/+v/9PJ2BKkMHA/G6rn3igNTCyD5q+76/03l6BcFCh7+cwG/8akP5vzSBgnvRRBS+vcYWgd3Drkdzvx+8/0I"
        "dBLF+uYPjOxv/jz4ZAAyBYLt+wcZ8O77QhIC7xgIJfPdA7UKwA8Z9an/nBIaB/r0Zv3e+a4FIxJ/9VQBOwTGE6ANbvy3+WoGVuzvFb0M"
        "YCAQ+pwJ+/2SDJzxOQA89RUQ/QkNBB7olwTs8x/7iRAk7qIGOxovCyntvPmW34L0LvsC69L79RoBDED13wD26Kj3wvXeKM33wPsIEjj6"
        "qxMSAg8MHf4RDtPswQRGD3AJ9Ro78/jrXwJK+zcQf/Tw6ZsO1fuXAarggyD6Fo4Gz/hsBakcPBX78lr+ggFi/EHjBAwB/PYP3fwT8hIH"
        "qehe9Z/+tgYu/Y0Dxvdm3bIe/fM5EBwGWuaJ8gz/aQzCCp8X2+tR/3YIC++dEVz/uQhj8Pb60ASOCo/lcgJR9pIHmPqZFVHsbw/NAl3y"
        "9Rg7GHb99OJK827q8PlTA7MD+NS/9ssKEgRgH3//phIlMdful/cUC8H++uTo9g7zSgUsCN/l5fUdAlzjVvmoBWzslROoBQUDDA9FEqMF"
        "PAAg9ov5qRllAjjwKgekEwH5YPVC7P0D4QvlFZj4aQXW//AVCebKABwOXPYs/joNvhj28dkD9/ieDun0NwPhGNL7k+op+acHhQTt6KDo"
        "wwoOBbj08vH1CnP6eODlDk4Ayf8xDvYBMxAI+8fwnv2aGC0DHBGB3UvqffmY8lcHJQKb9mH7FBWr50cMXP7mG34O+wFy8JD78M1HBjvk"
        "egLh/K0PXu/l/P/vZQyf4S0Njvan6JEBO+kh+VT2uQaG86fVjQ9TAMsBdv0fCN3sVfso7MAEGhKyCED0MhQfBAjf7/uK7CH+nQRr980L"
        "8hmpDWr1pABHDDD+6PhhD/AGbRdXAH/0vuf1CfQCVCEaFLD4zA1RI34DEPta5LzwyAN07v8Ajf2F/STdAwUQFpHrFPTXDz/6zQOa6mX8"
        "/d+V8Ar3AAt9//Xv5+g38GMbCdzQ/Vfh9AlrKZPwyhC4Ac39PAWq7DL4uBxz9SQUK+rWBm/vqiMcFIMBUOiDE0cC59L39cEIT/658QYc"
        "QvIWCF/5OfOaACUHXwnzF70E4ADtEEUR1CL4/ZkPY/V+3KsCY/nTC076+/d94lr6pBO98v/kHAQMAecInvETBekOcP7s9xIFyfJX/GEb"
        "3AAwDXok0fAT8yIDfv17EbwS5Pl76Lz52fUg57MROQb5+2r1hwQr8QX2WA6SJO8ZVuwZCNcNQvt/+skFm+uT5UIT2fIeAt0GshHC+FEE"
        "hh+/EiUJTPuG9CD5MAg6613+4vnEE9kFDOYn9OQMmOkMGJIc0PPLBmT1LSCO7xv8pwg5+rfppgUTEzH53SOJ6AYGm/eRBJkKAgCT7TD8"
        "ZPb+BtQRIPeu/50GNhWY/ZYF3hDp+JMcixPw2x0E/vZ8DP/9jw5H9MMVAvq1+bXuM933Ch8H1/zS4vjyY/yL5WwIBiRC+AYMTgJxGCsH"
        "6ANl73f5mvcr7j0QKwV//MsONPRKAUEaeAgZAV73tPhYFa8Jqw3fDW7m4xmW7vn9iB5jEaj+ufFS48wB+/alAnYLsP/sEkTxdfjqCgfj"
        "V/v37VoLAOi8Cfbxyhca/CYKVvn/923ckAFjH2D6eQ1VB6jx4u0+/cjgogWm+bYN/gR/1IIR6vvb9PAFyfsHDjf8fxPvBVrveAh5824X"
        "NO3l6BMGGAJsDwUA0gaB9lQV0/bm7Q7d3wYs+oYFXu0z/LgI+fwu8J8AuujC/UP+Pg2/5cnzk/98+AbsCRM+3hP4q949+GAWQgRP7mkP"
        "9QFZFyYI9vOv/4LuEPqvCBIXHAViIQf1i/YxC8rmJd+MEyjvCRQ8BDYJaOII4uEBR/d4If8lRBF3DHXxVfYBCoj+JB4tCgLw++2A+4z3"
        "JgK8DtgZLAde9Ar+hQwDCBP9tfWsBPL9pAbVFeD2uAMH5aXynvteAQbs1POlDPAi0hSU77MCFgbJ8g0BsQ2d7avZ3fv6H8oL1wPhFDr5"
        "3eZnFEvyTP9t9nMCRxOCDHIKGd3Z7pn8YBz+C2j3zPz97ZP8kBm1C6TzqxX7BDUojQNxC4YV5/xA79nqCeEnCGgDofnK8OIQUhHhAOUb"
        "7QgvBJr9XeEE8cbzCAkd6In4dQF99jgChA406cv/FPpMDBYOcxs+BbvzEheY7aP6SAoSDeEC7flC6pXsBfyjFgIJsiw9Ab3yzxMz6pAA"
        "MPjBCjf1Ph26A6//RwsOAUHzlxgiC7QAYe2o3hsNxfb9GDsCEe/KD0T/GwWr7r7+iuI9GnD1IwLU1nfq2x3RAogKPA8k/tTzCgtTBQEY"
        "owsSBtXksPW7AJbtgfpMERD+gfBzCC0Krv9O73j83ewEAcP2Og8UG17/7+riCeT2/BPBDFn7HBuALpQIx+tsBvMPPutd+KoO0OSS/Pnx"
        "YxUxDHABjh7o/L0GJRRh7b4AfA5E8QHy4PqVA2zwuSZI+QMT99eF6UgbrgIM6t/YuPfzA+MO6gioDyQk9v7RAJwPSwr9Et0BFPYm95L+"
        "1xrhCJXsr/zg86ETVuU//AAJ8fDb7ZECZ/qJ4uAB6QrQF1kCXgqo5YP5LApJGGv1IACfAqAl6u/K5zASsfXG7CkIvvPCHAsG9QyqBTv6"
        "N/c159Hx3BMfDJv/AQdU9BD/Q+Y="
    ),
    (3, 8): (
        "sACtDabvZPv36GsHsPRXMr/7kOAC9dMEjANLCxYcjBI9/wzoj+/jAkUJVfIR+M74lAicDbgDL/mH5LEWsP6c8gkQ0/3p61j0xPn1AcIe"
        "awU4BJH7yBjb6+z4WiA57TPzKxOp+ZP/EOn+DLAEbfCC8cT/rfjZ7ywIaxfk1eIOSeUO+1ACWgB2DKQNoyYqB5nzpQrxHdIRvgvg/mX2"
        "chZS63L/ax2YDQP6R/M/64sGieKl7Ij14OgdIoMNqPG84MHsxN7sE04GTQGK8Zf8FPnhCr4IZwscElX99Oh9BKL3cwEsEu/w4Pel7zoE"
        "zPZr/jL9zfUSGBPjAAR51xQNEe0OECj21wf25NztIwGgFNENRvzLFzIROOle8hwi5ftOCTXeXRwzFaLY9Qkd+/4GrhDOAOcEEfv/Dkzx"
        "4St0/vUXNgkxBS8cxw2/B7UTWfQQ/lfrGCkA774Glhcm9twAcAEb/GjzZAMIIzUQDegZ/Y0KVBUEAGrtXRmG3yD48vcvzssE5/EE7eT6"
        "EBU5B1cOoea0HKcAxQXk/Wv3FgvN770RL/jMJTAKiBY25MD1Sv3GAtYKLA6x4dv18RJP/UEDKwcw/rLqHfjK8w4hnBT5GoABjQ789Uv/"
        "cws35KLvsucX3GAHXAisEVjnnBpE7zIQxPrbAoL6XwPX2a/+ewReCUD0W/g="
    ),
    (3, 10): (
        "qhXICPUGtPK+DoEdG/olAJ77yfUEFB0LMR01KkX+GwOBBHQDPNrIGQbwiP68934QQf6d5EkLVdlT+BYDjRCOBMvqjhZU7zQGnRLB+jT0"
        "Xgzt+Uz/N+TRA73yTCV4CJAO8fWm7lLkBvlGBekRpP8BCtYaYwvA4/wSkvPI/ZUDZwe6/DEUdg1L8OT9Uhw9CccF9gO/A9b57u8S/6Pm"
        "7AmIFbf6owRoAMgdwu7ICsrzmhbm94wHUyNTAxjzBOKe+RYP1hSo6Xj5WAzs77X5fAb0/z/yohEkAuEBf8gS66n4nxti6f8PFPOKAyT8"
        "6P1Z9kkJ3/7k7+UJN/uoLqPqPBHn9Mr+cCKu9yEcVhPP23kBdwjK5kcKOvy87nb2FAakArQQtg4YB1AAW/gV8hz7KxQUHkH5LfSE6W/i"
        "3e68HPPuOv1f9i8PbRhwCTLxu/031loF8TBhBjsFcwDFEgwSGgzFGwsHMw2TF+sisOqF+9UDAt/C7KkWcg6cGYIqm/ST/QYNkPpm6uHy"
        "8RKlAxvepgoJASEZbu0V9P/7miNDEjsOsgHh8lYSROreJbUuKfgmBFYNXf0L0TgEnguJGTntffPv+Lj3eAENC1wbOvvzBkQBYg574DT+"
        "6fWbBQHwyBbbC8D7OxDh86/tawiUFaIABB+059MRMw70HEAA0fZnBBbuheaY7QYS8hbfCqQKUgPp9KL7wiCo+1vzSRL56QQAst28Kgr/"
        "Ddwj5lLv1fdC6zwZq/637rTpgvlPCj70hAUJ4mf+NAIA5WMAWe0XCRj0P/zA7nQAQPrv+FoZi+QR7CgDzwiuCGL3ZPFL/bT/EwRH9yoP"
        "DhT2/noAfwwcGnLtb/lZ9XX/ygj963MD5hO91UX7efQW/RsSgd3L9jwIrgpD8PXk4QKq93bcqg6153PlofxmCPwKaPauEzX/cgPR/ZYO"
        "WQdHCJMP/+GSANv38Beo8TnrwQfRFcwNEgU0ATP1ffwT/QD3VA83C9n1j+oL79MFu/23A0QVIOBYIV4Bxgfu+fQN5Ahr9wfyJeby6i79"
        "EwShEATt9gpf9/D6nwDKAygHCBFLB9YOXO/F/HsCoPcnAUEHSRS7/8TzDhsiBUL9HgeX6Pr7jhv35yvgXwh8AW3vWPWZCYz2V+84/RIO"
        "3PdtFQECse9J40rbQvyiz0fpRe439a8hmuAk134FxRBcCw7yvOjd9ioN9BU3AI/gqPwWBNvwp/Uh+wb/EQi7CDnuOwNiD6zbLhm/D44F"
        "ovoo/1kLZfGGBdv4qBaRIg3WMh25/zQWQgWu+iMAq+vmC80ff/bQ8q8mrg336ZAK7Pl1B1AEIfSY/HgGdRF+8Kzxp+YrAkjcDPdfKCj/"
        "4QjX504SeAdr95Eh/u8F/OEAL/YKBRwM+xYDBPPo/e7U9OD7wBy295AWNvHtBKLgRvZ46SIK9Q9oC2f1MO5L/7P8XwfUDyYLxxXKGTIJ"
        "IgUYE7QNZwg85Nf9KeCXE4PzWOoa/8ADSPrC+WQeaOmOAYQDUPEoFw78aAOUE68NgAo7/j8FXPhX7VshZhDJ/Fr3TgejENIVCREu7osM"
        "TBylBvPpVPci87nhSfxF7BLzFwi2Fl8S1QG7Dsfl//9UHhsNUBR5CJD6YCbWAZEOFfutBGH0BQCi7lQKCfsZ/7gEfvBtGP7oIQ499oPf"
        "3RfOCTf4KO3KCYsF9P7LEMsgFger98ryZABO4QkBjfyQ80Lk5OuU/oQFDA9gHDf24fJ1AtDnPeNT8KHsrRJ++jreFP5pBcb/ZAtP8jz5"
        "9+e12W8GAOP1FFoNR/hIAFnwxggTJB8PuwGi+DkCtQ0ZF20CSfL56Yj7agjP8DT2IycMDFEU3Oun8tEIzg139Y/7A/3N9/oGVe+tIT78"
        "N/TAAZkJhgNWAID69gtZ8+D2ruoWCuEFLuwzDwr5+xVm/7cJOArX/Cvy0uSpDvT3BwUSAEIFgRSm7UgbMA4h+OTx/eTCKAMLseiQ+mwC"
        "/gH3HXwFj/iE7oAIjRC5AgH0Ev6V6dYMahZMBDH/nOdD81z6ZOIH7s0Y3vblENPvP+dbIDsDSw6W/awfRRGRGAwI9e7n43v5+fKu/kAF"
        "ehHMDKLqzu9hCu7y5gs+BeD6bAN3/mjd3wR49DwWkhBC/tgJgPrIDOIHqACR8y4NrgLP+aX35wCs+qXoQhHjBugKo/IS7532iBEcIE0V"
        "PAY3LOH2aQsAArIMygH67CPofPv28kchMhba8wYOO/yM2qEFuvy37ZYLSu7G//30CxJ7F5v7tQtyBGbifABt/rT1PAX77+zoG/lWEd3y"
        "QOYe+T3sTwkk/ijwDgJE9uXqxxQ281H+nux9CS/yMRy4+JbhNQXr/Z/qUSWWBuv6FP9LETfzfPe+DWwDNgn/9J4Q5u2GF938Neb3H3QH"
        "RQLwDcQVUv3t9H/oVtdF8pkQRgWG/8b+qve2G/4Idfnn+6sSAw2CAd8Zqwcz9dYNvvoQBcXysv+S3ysX5QfX4w7z9fnv6Nn/+t2Y7RD6"
        "5geEDDb+LfE0A2oY1vnwERAB5xm4+ZQMw/dY8NnkQhQsCE0QnxVl9hgbxQKF6Jz6VwPVJf7kPgzMGbftQ+bv+e0Rw/RYAkX21QHLCAT7"
        "2wniEFMJHPnE/rsZr+y79MADh+yPDY/3CvLC/MYFteST2Jcf3hRG82bmmxuTCg79EBLyGxsJ3/tbDWITIQNDAgHzjND8/6cJefkhA043"
        "6+wz9zwYFgCeBkD4mfvD08Xzp+0="
    ),
    (4, 8): (
        "OwL38+r3eQlA8N75D/XDBb/9cSCb/8kMf/HE3/b6Buz6CEobj/RPBIIO1CU2DPsCnAZ0Fi8So/qCCQDvhAEP/3jpfPdQA6UNCvPZ42f9"
        "dPpk7WAGUvi9EIcUjgDH8OT17vux/gkR1AHu5g4Ff9k4DnD0Cggy71oVh+J/0lQLjvi4D/v/Pv+0Gir10QMr5+72XPor+RwIwu4G8hQX"
        "0B4d/L32qAYD8C8M2jR2FHoPquu6ABboKv358sD7JPkWCRH16Q418Bvs0gfC/akMiwBv9HoJLvyw+SMCrx3iBPwjxRJ5+d0PyBWn9GQe"
        "TQzCEvwXsQG54wIO9QSiGTUIef3q6C/sSwQy5Qb6F/g6/lYJmfsqDtv1EALd8dcQHhWKBpzfXgwqJE8H+/zgEcMc/d+hCvgESsuNFxXl"
        "tgKD+FgA+fHH8U38s+n9Eind/AioLWQACflFDKEcLe2J9usPUwQBGM8GegPc5onY1O0PAXL6d/2eFW8ab+rZ9gcikQty/l7yRhNwDEoK"
        "cQWpCDQBphcA3JH1ue51BF7qXhtc/UkPseSCGaMAceHiBs0C2PL79wLvbwTsEFj0Yv4H6Kj7ddzOCoL+W/qjIN8AO+pn710EdP62Cyzy"
        "rvcWCEAqZvUuEyvtnQMxFKgP5Ceq4qgGx9TUCCb8iAC4C9TnGezh8h/3dO8="
    ),
    (4, 10): (
        "xO11B2LqWNl9EssArfx6Fp7UZOBh+3kNegqD+M4OCQVeAFXr+wvHBlwPT+af9YQD5wjH7vrhRP1o8qP60xLz8D32Mvs2EaQH2QQdG5To"
        "ZPP9CawM5O+L/67tRRUuAmr+RwL97CUFrQz79nsJQ/8Z/VMU0vK21AHkhDnn+UUItw4lH2ERBAKeFuH9Wft392gF9gqRGqAD2fKW1nPv"
        "EwhzCDT0+AZk/3Ptvhcl9pDj/BAv8HPptPfLAtj7kPE93RwMlvwh/xL6cAFV2tn0ugn0+DMHvgXGDfDs5OA59hzyMAT45VAFOw2r9+fv"
        "Zgte+Tv/EushAxoITfTN+wIRqwHL9AoYmOoZIo8RXQ4nBfnm8AGU/J0BMwgJ7Ij/rgdxC2D5ugjRAwH6LBOMHq7xIf4MGrP7oTPwAE4G"
        "u/fn9eELuxY9BX4KPgLVGM73T+JH7wgkaOvqD/b9zeWS58AHnh6m83TfU8YvCUcG/BlUDzABwAssF4r6rR3w9gMC3f05BXcFj/yI/68P"
        "N/5TzDv6Ygp8B7QMMSBiLYIbXxRNJkzvfAFfDPUWKuwL/PADKROZAQ7oPwdJAEXkYvRiEJIEVPDC+F4CPv4H+EkFP/Nj+Bbbae805GX/"
        "vvpF/HoZFw1eE+z1NfvH2Hkl9AdG/0n0LOy2KoHz3gJeDykc4vcuF+UgTAvk3/gKKxvcB/UWNBA9A/ESmPdN6CoA6fpQ/QsgA/VPBEIE"
        "LgH3BwMPGQxI7jwThfiJCrEK8hcRB6T9SA53/gURQBME4x3+6vlDCdL/Jxa9DHQQbfO4Bcb2LvxrA8AaJRhEDgb7fyDU/y76ivEZ4+b1"
        "xBEGB9H9ye1X6ncUOwPwF2AOYxnPCpsTfAeOARof9P60BKgmZ+vK7jnwd9ygA+vy2Nno35wFIPPMAmH5rPzDIYPtNv5sCqHmderGFIon"
        "7fhDDRMF5/Q1AQwULAnsL3z8APhbIRcK0QLj+VQA3AeI/HzxWAk/FJYCFwXK9nkrY+ttDY7/xeJo/b0cOvsu9oL5BP9l8EQGmAMoAVjy"
        "rS+fI07sOhA8Hi71NPjP9ef6EuEs7V/zKxE3Gh/9bAuR+gsVgffX85Pnku9lBpwd4eqVAJ/1wA25GHH97/oe8gkAZgXZ76r7EetpCAEA"
        "Ah5I+T0Dthvl9yn9mfGkA8jlzfqo7n4lreouAVUGRxV1B2f0Kwpo5tAiBvwMCg3w2+zC/xjqvPMIDQEEaxfC9Q0RSvi6HXLxcRLU9tIJ"
        "0v/p+D/sMv0HBD0IewbCAfYNIAxHASL8PPL05kkA5/ah7/D5kxHlCDft0Cp9834PTeqt/BcFCwyr9dEMk/H95HUV2ASvCnAHpQ9GI7Le"
        "IwLIGHccYBOjDwz1Kecq+ZIOKvk7Cz3iv/5R8Lf0h/sZB5PyyAFqFHz3ZPie/Cr0qgIA6FcAPAwM8b8A/g+4BYLeIfYY7Vj5oRN3Gfjt"
        "KAi/JoH+PgGEDLv1OvvDAwH1BxXn8Pr4eenK8FzuxeA06nv8thD7+Ef2/AFY0g4KNeWT8RIF8P3mGbzncAqQD6UHRRvlA+H34fPC+wbv"
        "Zvid5TYRLd3P/97/BxbpCjDoke5pEmv/Q/OnCBYXZvUwBK7eVQ1OAlgQ6AbJBgcQ5hgzDewDEw0H/N8Fle3AH3wAzwdUEiwVK/NJCl0p"
        "/vZW8Bwc7fqZAbEDjgfs8o4FfuWG92r9ywo7AAoOq+y0+bD8oO3P7xIFD/T9Bn73BBCbCWf2zv7MAsgLZ/J96Vf8EwmeA4j2aPkr8AUh"
        "XOy1DOMTaw+R/8TYWvONGXffNR5s8vPcKRNe0agWrPxND84BUNdaAlD61wbd/q72bOPvBn8S6wF77TkK4esABKj5KPh19s7ob//u3p0E"
        "8/Jt8Xbyzeze5mAGigvx70/bh/ty+WkDhf5CASDj6RN0Gsv1YQ/w9Zz8+849++vpt/icHLMRgfiW/1AUKQrvBbkWmgKF4hX67vDzDAvs"
        "L/XvAg/nQf6fE7736gj3APr7SAUDEGsOifUg407oWwwyFnnyVvvZCPXuZQSZEJgSvwjk/uLqPxPPCy4W+AHqCGv1Y/Gb/GHonf5hEQr4"
        "tvqxBYEgHQ9V/8oolAqq/r0Szvt38IwFQBec9bcCTBuT+cUHiQ616V8jlgFDCCby8dXZ7QH6//3v9FQYcRIjDkUExvi/267olSHTB/Pt"
        "QvmW8wz96P1SHK4AdxUCEokMyA7k953pb/wz+/UNzP489hvpy/2b7sT4egFA8S8KygRo7JkDFBZz5ZICz+4K5xj56vVQGmcA9Amu/ZIN"
        "0v17BOAUEQll+9EFHAB4+Pv7HuXTGB4EU/Mt9mjc1hzQD0AMKwnc75PstBN2Ch3lKf+w8wH9uwGs7hoVYgS0HQ34X/qTB4Hp9RBxAIMB"
        "YPSrAnIe2fl4I7UOwwPQB7UG5g3lE+cGfulI/RYLWAb1D7rxxQwrBvjrIRg1AJHywP2o7t0JMt5HAiv1jvbf+bjr7fPe/TcREQXlDQDy"
        "m+c/COYW2wp49gbjSu8UAUnqhgNdEA/wAAcS+5v0OxiZ8er+SQywCRP+LfXy7aP4Q/dl+qsA4eCT9Bz4/+ofG/z+6wQL8b0JbA9ODS8S"
        "2/xM5BbxIQ5YBZEIEP6iBJbp2/gl+xT7IxGN9J0LLgG7Cab7pfWd7fYI1OD5/T8U6AEWDZ4lgQs3BaUQUeqx5aTxWv5QAakYKvbK4IgH"
        "C/Ev+vwKzQWKFWjzUec1ATzkne4="
    ),
}


def has_table(bits: int, state_bits: int) -> bool:
    """True if there is a table."""
    return (bits, state_bits) in _TABLES


@cache
def table_values(bits: int, state_bits: int) -> tuple[int, ...]:
    """Return the value of each state, as a multiple of 1 / TABLE_SCALE.

    Raises:
        KeyError: there is no such table.
    """
    content = base64.b64decode(_TABLES[bits, state_bits])
    pairs = zip(content[::2], content[1::2])
    return tuple((low | high << 8) - ((high & 0x80) << 9) for low, high in pairs)

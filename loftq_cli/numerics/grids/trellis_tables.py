"""Tables of the trellis, trained on Gaussian numbers. Written by scripts/make_trellis_tables.py.

Mean squared error on Gaussian numbers of variance 1:
* 2 bits, 256 states: 0.07875
* 2 bits, 1024 states: 0.07430
* 3 bits, 256 states: 0.02152
* 3 bits, 1024 states: 0.01974
* 4 bits, 256 states: 0.00614
* 4 bits, 1024 states: 0.00526
"""

from __future__ import annotations

import base64
from functools import cache

TABLE_SCALE = 4096  # tables contain multiples of 1 / TABLE_SCALE
TABLE_NUMBER = 1  # of these tables, in config.json of a packed checkpoint

# 16-bit integers, little-endian, in base64, by bits and state_bits.
_TABLES = {
    (2, 8): (
        "iAUE7owUNPanHwoQ8gZN+tcI4xf/9ukAhQ/F9ZztYuEw9ScQ++I5A9X/WvAm35MNp/0EFp3xzQQ5GDcAoO6tBPLw7hEdCG7/IO28CJMk"
        "+fjMEtkFqvww0Z709P956NcMnft55+Lz3gXzCN0bzfYVCgLeKu27EHf+vvfXEtsDuOP5HOkIzgKG/MvnNgIt9EEKMh6i+v39vw4ZBkAT"
        "+P1r+DsI8fGt9ZD9LgJ931DyiBNdAe4L8vEt8GoEUQyI99IcLPuu6AjtNQteC4XsVRXgACX7ov/C7LL59xlADNHbBS6KDEQK8v7q9L3w"
        "kvwhJfQKUf/I9H8EkeclDdQDpxaW8nD/TPcMFfsNWAxKHMkopfwl67bzngxJ4CXtwPqt1boH2hgRAKwJ4fkt9+4Crw6Z7Azi8fYwAxsQ"
        "B+8Y4sgP7PqoE6EFMxnq9iraVPyEAjnuTgb67PcDRg8y/ob3w+0jCM8odP1TEonkeAgWESn3bv4YCgAXnwC48j0TvvUp6EMD5gUmH6j0"
        "pgaOBOn1GP8C6Oj3mQX/5rsa5v1+53APIvOTBYvoffbxEs/1+wUfF/P+uu9WAn8Pmfc5+54hkABqDvsJp/qs/cAco//I8e8R5AsH/8sP"
        "fvaO7HIHbwS5+OgXWOmx+jIIUu/n4mr/JQo+8l/xFv8MGxsKQwq4/BTvL/w="
    ),
    (2, 10): (
        "JuxR/ST4hhpICxvnnSUi/ygAvvI0BZQN7ww36vX6VAOGCoz2WfCT/4Dk6RcfCygAqwDv80UMdfkwBPfuPREH+sgdAQhsDVcbav2R8hAI"
        "oREL/EsPNe4L+n35t/TZBBfqCQim8A38+BLX7ZgKOvTPADoKDhGs9rkB9hJpBhL26/oR+KkHbhLO9ycCIAjEEOsP2v8s+ScAhe0PGCQP"
        "VSA5+7EMF/3jCZru+wJt9pQUxggcAhTm6wgx9p/8IxCj7ykIVBefCU7tLfoF4Ef2ufhi7CH8NR0EDGT0v/zn6NH7UP3hJDj3jP0mD6H9"
        "7hPYAqgMNP3ODV7thgTGDB8G7hhc89juXwEc/wwRHe9l6Y8Q0PoLAb/eEiBRGDAGlfaJAvggjxEOBKXyiP4N+czlsAsv+bIPUv+h8Q8G"
        "qOqT9o3/OwY3/2kFsPiO2sQcWfOREAwHpOSs89gBDg2/DT8ZFOql+O8Iz/P/EMsDZQQH8Kz7dQYDAwHkrwh29loGdvudFGDpThHj/ozv"
        "vRvaFQz+b+Li8xTpcfgtAxsDc9KT+V4J7QU0IOj/ZBJEMhDu4fNrCuH9UeNO+Fj0egWcCdHl1PXv/7Xh2PvzAn3tNhAQB2EDYRDUGCkK"
        "UvxR+dX4SB3TATXvWQY9Evz3ovOV7JsDOw1zGQv1lwOdAIcSjuNmAU8QmPdh/AsP7Bmi8CsF9PWJEEL4jgUmGtn8SepD+UcFUApy6ZLr"
        "SgvrBf30ufIVC1z7P+FyEw4GcP4mCvEE9A9X+3Pvr/61FekBGBNs3WPrAPij8r8GSv249nMEtBTu4iILAv+/FsMZfAOD7ar8psq3BjDk"
        "rQKB/F8Nku8u/yXvfw2I4skJr/Q26tL+6On4+GP0XAa88t/UMw7oAFH8fAABBGHvK/vv7O4F4RTSCS7xlRNvBQndkvzG77r/4QLu9w0M"
        "FxvdCID0kf6xDjT9FfmWDC0Gxg/A+6zzZud4CJYEayKuFKL6qA9uI1EE/vl94f7viAGA7scFEv5f+pjb1AaTFpjpNvFTECf4dQAN3SH4"
        "veDO7BX37QjR/Rzvx+dS8N4fx9y+/i7ivwRzKW/xuBEZBH0AAwUR67P6Ixn29TcS7uqDCPb1jR+UFCIESepXEl0B7NKA804KTf6K8kgc"
        "FvMECjP79/ZUBMIHoP63GDUE8wBCELEN1CJZ/VQWJvbc3PkCE/glCjf79fj93RXychMG/LfouAOLAF8Ls/CEBBQOVv9U94UExvRr+wwe"
        "sAGADxIiB/CB8Tj79QAAEp0SNP4q54j35vRN5bENsggq/LryywLU89Dz+A/yJbwazu3XBa4L8fte+9oD9OuC52AOYPD9/wcKAhPS+kQA"
        "fyJfEkIMDPkz9br8QQgA7Kf7aPsjGEcHT+Vr9nAOBeyaF0cc5PgsB7fwAiDo8mb72QMI+zHnCAVGEzr3qiXE6UgHX/dZBvYI4v2F8PT8"
        "BfZtBi4Ukfim/xMGYBaf/xEIoxFI+gwgqhQn28wCC/eNC/H/ahFz+qET9/IP+cfuW93BCEQH6PqV4tXwy/uB5QkKNSbJ93EH3gKrFsIE"
        "OAUk74D54Pbi7UsPxQPJ+6INvPP6AeYa0wHJA+r32vaCFJUMYgduDXLqwRiW77H61x7VEygDH/FY408BDfd5AXgLPABPFBbv5/c/Df/j"
        "vvJw8C4Lk+b1Ckvy3hgv/HQLo/w+80/ZKwNvHVL7lwqPCLHzEutHAtDszgHj+MMMYQTq0bkTe/wi9LkBw/o0Dcn6CBK4A2bwMwdw82IV"
        "ROv85joGGQF/DksAlgeS9poVufHQ7vHcRgBJ/L8E5e3i+y0JSAAW8cX/6OY4+8EB9QwP5TPx6f4i+EzsaRQJ4Jv4buCg9rQXXQZ6718O"
        "qQFXGYIGqvHp/6HqrPvSCXIYhwN1IdnxTvZNDonla+GfFBjwJRW8BkUI5t8z5WoCqPjAInEnGQ0gD/zzn/cxDaH+Xhh+AQPz8exI+V/3"
        "ZAHxDpEaCQuY9VMDSA1cBiz8WPftCA3+9AVGFJb5UAYS4y/yC/rCAUrtEfL9DpkhnBSJ8JkB5gbw8fr/vwsw72jXgP3RHBgK+ALzFNX5"
        "f+eHD9Typv36+VcERBGXDhgM+NyI8F//PRGXFWr3bwB37Lj74hmvCvHv+xeYCfktsQMoCs4Wivoy7z/qNeBuCD4E/fyS9FUQtBHbALwd"
        "ngkGBST82eHk8Zzw9Qi+5Zf5Yv5m+L8EiRCv6bH/6ftOD48OIhkbB9LyURPS7Rn9ZgmaC5AByvec5g/uw/68FjMJNjEeBub09xZl6igC"
        "LvkOEm/0uB2YAxcCLQsBARryzByhC03/gOyI4bUWpvphGMgDru7CD3T/cAYY9EsAeueHGfb0gwPZ1gnpmh6a/KQIBw9p/pr1nwrZBJYW"
        "sAX3CC/ojvc9/Tjtv/qMEML9Vu2XCRQIvAD075P9G+55/jv03Q/VGyL/a+xPCCz3cxG+DL37dRcwKgkLPOqrBi0OLOwL+x0OzuXT/Y/0"
        "GRMQDu3/DSCeANgGchcV7twBCQ9c9Cvth/qtAy/w+Cgs93MR1deH6uQcgQFI6afXzvVKAqIMjweVEDUoYPY3Av4RFgw8EzQDOfYA8hH9"
        "Hhz3CvHqef5Y9FIW0+HY+/gIZu9l7YMCVfqI3tIAgAy1H1YHCglW5Gr4ZwzvF633UQGNA2MnKu/p5/kPGfXb6QcHx/JuHpEHzAzI/8z6"
        "RvZE4lj3BBaWCzgCtArq9YP/n+Y="
    ),
    (3, 8): (
        "Zv8mDRTvg/x46fgGPfWANS38ZeCB9Z8FHwQKC9Ya2xI0A2bpUPDOAIIJGPP1+Kr4kQh4DiYFOPk55MEWb/+E8rsPg/2a8Hv1WfrRAVQe"
        "SwXWAyz7tRjb7IH0qiD86/z36hGT+Yj+e+nZCzUD4fBa8SD/nPev794HbhcT1G4OmeRm+v8B9//GC/YNsie9Bh/z0gpdHA8UtQ3o/1z3"
        "qxQy6m7+eSBgELn5pPNd63kG2OEW7TT2quhnI9wM/vF34HPsst6+EzEG0wEC8kP8dvkuCzgI+wmCEFb/JumLA1L29vwiE2jwmPe88GQD"
        "QfZJ/In9F/YzF53iNAQf1xsMiu1aD9r1Lgja5cvtywFYFOANifxSGCcRO+hU85ciRfwKCZLcYRueFlHVpwmi+c4G3xBrAKwE/PrSDhbx"
        "WC2S/agWrggqBAgcRA3bB3kSRvOk/lbrKCof7uoGhxvY+e0BZgGA/3zzOQTyI7kPTecw/MkKlRV3/2nthBi03VP48/aoy44E+fC87Iv6"
        "1hRiBwsOv+YnHegAXQXt/Tj54Aor7xgSKPX+Jd0LtBhY5Kv0qfy0AnoJ3w1K4Yf2TRLj/SwDEwed/SvpWvaB8SEhqxXbGyb/zQ459x//"
        "Vwvd48rvXOfC21sG+QjlEtrm4Ru27twPnPveAhH6QQL02Mn+qgSVCZv0Mvg="
    ),
    (3, 10): (
        "VRWGBoMJFfTzDssdo/q7/3n9kfb2FE0KGh3iJxj9lwICBsEB49qLGlDvHQFx+E0RCv4246sKW9bc+IUCmA7hBb3qcRbr7QgG0xI89oX2"
        "9Av8+n7/ruLbAvbxsCd8CAEOSPXS7q/jKPe/BeoRkP8pChIa+QpX5a4S8PRj/jIEdQfg/fsTTA6w8NT9qhwLBssK1ANVArn5du+K/0fn"
        "AQkDFGH74wQbANcedO9VCuPz0xc9+AMH0SQOA/zyn+KN+U0PYxRk6nj5Sgw98AP51wgXAXbzQxIjAvMIBsV/6bD5/xrv6KIQEfS9A7L7"
        "df3D9bkJGAAM72cKv/uDLr/qAxLE9c7/jSHM9qsamhOB2tb+mgiU510My/tT7Zn1MAeFArwQPg+JBjoAV/k58jj8nhP4Hlb4xvND6cvh"
        "hOseHLrvbvwL91oP7BgMDnHxXvwC1wsHGzRYBhUEUQJDEAcSegsvG4ALBA3+FOIiz+8P+2oEhd4V7DIX9gy+G6wp2/RG/e8P3fnG50/y"
        "chIdAZTdpgpoApAaI+469SL7sSNhE88OwgLn8ZEY0OpAJtwwhvbsBV8P+PxHz9YDIwu1GrbtavN9+vr3pACqCWgcnfr0BggB6g2W4gz+"
        "K/YbBEjwdxZ9C4v77A9x8y3u3QiOFH8Bnxzk56QUVA/jHcH/8vbdBNzk9+uU7t8RjBXwCr4L6QLq9D38HyJf/GTzlhGV6AICq9zSLUH+"
        "jtmo5UHvz/fl6hYa3gDk7VLoyPgsC2r0FQZb4E//aQKu4U0ALuxqCMjyKP2i8LoAZPtr+CEXtuQ07fcDXgjQB8T2s/Ag/Ij/8gNE98MP"
        "XRMPAkX/nQxTGlLttfh++T3/kQkM6ncDyRZh1E/6HfJl/BQS3dtr9b8KRAUG7xLkKgP09w3dBQ7M58TlBPxRCSAKxvVsE6j+6QH0/k4P"
        "XwcsB5IP5+ED/+/28Bb98P3qwQfTFJ0NcgPTAQf3TPyv/kX34w2aC8P1zerE7vEFs/1lBaIVveF0II8ACwcT+8AOeQpu9vzxWOeh7Cz9"
        "SAQbEQrtKQrz9sT6XgBZARAH1hGrBY8O8u4LAM3/zPc7A0EIpBOL/rPzlBqPBa79cQWI5178WRzq5szdQAaAAAPwX/XhCK32bvBO/BMP"
        "gPltFXECAO6K4w3ca/wlzrfpuu6m9PIgA+Ad1Z8E8Q+6CrHyfOir9wIMohd9/3HgIf9dBPfwIvaz+nj/xggvBjXuoAKnDc3cGhOlDkMF"
        "NvwJ/YYKY/LSBd/4EBdyIoXVTBuq//YVqAeN+acAjuuXC28fEfVP8jAoQAsc64AQfPomCfQEAfXR/K4GOxEv7pbxeOarA6PaoPg6Ko3/"
        "eAiT5rsS0wfj9SQhje+h+wT/LfZwBHQLtxWRA1HovO778yf8HB4W99AWmfEpBT3hVPY96D4L1RDpCi/zH+5d/If9zAfgD4UKCRgxGW4K"
        "vQUsExsNiweC4iP/gt+sFDXzGepmAO8CE/lM+nAfv+pABY0CTeoZGKH7IwFeFPAO/wol/qsFW/i67vMibg1y/Rf28Qb9EHkWmhK57RUN"
        "OhzfBsfpjvgV84nhxvwQ7JLyUQflFnUSTwGTDZvkr/+cIsgMyBVUB2v6zCADAngPMPwXAvv0kQAh8GQI9PnX/hIE9fBhF1npiw7k9R/e"
        "ZRgVCBP5Ce6JCcUGGP8dEEkihQa29v731QH549EB3fym8nrkqus4ASAG8AyMHbP20fUBA13oquL28Kzs5hAM+gDdCwA8BX/8hQkO8jD7"
        "juen2PIGkOG5FDsNZvivAGXwQQiQJWsP7wCN97YBEA7iF6QD/fMX6wL9MAkE9EH97SkaB1sUauuO8XIM+w299Hj7ufwH9fAGEu9FIBX8"
        "s/ONAawIRwOnAEL6Xwyx8vf2oOpBCp0FP+xFEFP4fhQ+/44KhApa+0rzR99JD3H54wO/ADQENBPU7bwaTw21+ELyqufZKRcLneeN+p0B"
        "kAP3HxgGXfnC7q8GWw2yAXjzEv7a6ZwMMhjKA/3+uOZO9Cb7SOLV7d4ZUvXuEELvQea1IjkEwQ7e/MQfzhFIGVgIeO6k4tr4hPNY/ZQE"
        "mBC6DPzq0O+wCYLxNgwMBa358AK//jneVQWz9TAWABHw/sQJzvrdDWAI5f9I8kAJoQHt+rH3ggI1+RToehCCBr8IvPD48B/20BEjIH0X"
        "uQb0LYz29QowA4oNxvuR7JPntv308jQlQxjC84gNr/2V2BAGePrw7XMFrfOR/sfw3w/CFcv8+wpMBDfizwDn/lD1NwXK7ern1/nGENby"
        "W+aV+6Lshgig+uLxmAHc9c/pAxUg82b+TuxlCTvyYBw7+dPfVAQb/nXrICbLBur6pv5fEonzkPf+DX8DbQuX9e4QgO3LF3r9SOppIBsH"
        "5QHQDBEWKv1B9Yfn9tbw71INuASeABD9oPaRGtAISPne+5YSew9TAfgaNQn+9RwO1PqjBLjxgv+J35UVkwhD5Yn0Xfnp5ff+X92A7Qf8"
        "6QkhDlP+A/HIA9IZ4fdQE7UBnhlB+nIMwvZs8KnlchTXCDcQExaU9sUXJwO86Uv3hgO4JirjbgyYGPrt4+fu+DkTVfZWA8L0fQAkDAf7"
        "MglQEaIJXfnN/t0Zhu4b9IUDpuyEDW74vvIo/AwHCeW91poeBBV98nXmBR6gCr38LBLCG3kJhvzwDqgTtAS+ApTzq80iAPAI/PnGAi86"
        "Cu3G958aZwCYBl32gftm0rDz7ew="
    ),
    (4, 8): (
        "yAHM9AL4FAmM8MX5pvSxBdL9vx+N/5ELI/K63z/7Eu1bCJUar/QCBBUOviZ+CyADDQboFecRlvoKCWnwYgH//jHqH/gIAjQNYPPn4+b8"
        "V/rL7agFY/cpEBcUUv8F8Xv1Q/uQ/m4QFAL65oUFEdnoDYX0HAin7nwVn+I/0QELXPg1DrD/1v/+GjP1DASC5zH33fr8+MYHLO8m8jIX"
        "hB4k/I/2VAZn79YLYTdvFPMObeuiABDoL/2q8mv7BPm7CH/1uQ+K8ErsdAeB/TUMYgCn9KAJJfzB+T8CSR3VBCclLBPz+WgPBxVu9Vkd"
        "5g2sErIX3QEB5NEMEwUbGbcIrP1Z6Qvs4gNN5Wv6Qfh1/pYI+PvnDbT1CwLI8ooQ+RQmBoPfmQvuHyYFfv25EZQiguD9CcAH2smAF0zl"
        "ywIu+bUA+fKl8Wj8m+njEW/bcAm5Lq8AW/nXDJ8c9ezA9o4QPgTaF+IGewMv5//XWu4RAXT6ef3pFXEacuoA9/MiFAzI/jvyJhP5CycI"
        "ggXLCSsCYBcw3Sf2+O4vBNfqORtt/v8OOuXJGZ8AtuG1BtUCCvLw99juYQTqEGb0UP4K6Nj7idxNCuP9afqJINMAt+pv8lQEAv/OC2nw"
        "PPgECAUrqfWPEn/t9gPxE8QP+ie+4twGJ9TgCTz8kgA1DD3oQ+wh8hT3Fe8="
    ),
    (4, 10): (
        "S+vCB7vwgthxEnUAvPxlFprT8t5b/FENDQvc+PkOJgXHADvsSAz4BYEPVed59VUD5giK73jiIP7C8sL6MxIa8NbzQPusEN8HSAWHG9zo"
        "JvcNCt8L2u8dALjtJBV0Arb+hALQ7MwEGg4y9zUJPv9Y/YEUOPMD1X/kmjy++q8HnQwwIB4QfQKRFrr98Po796MGuAqjGj8EOvOp1drv"
        "FgmVB6D0kAZh/wTuEhda9t/ieRGc8Gvq8/fgAjX8SvJp3EkKg/w6/9r5CAH62L/1NQp0+UQH9wQJDlrtFOAt9ojySAWG5AcF1gzG94Xv"
        "YQo2+R7/2uhNA7QHmPO7++oQKwF+9S8YqOrZIcYRaA4jBbbmggLi/LwA+gc16xYABQe/Czf5mQiSAwn6PBPCHgLyJ/5DGqv71zVAAQUG"
        "2Pf49bgL/BbZBAEJ8QFNGUz4G+Jo8TkkIeyhD9L9AObn5+MHGR499B7fDMJZCFUFlxnODn8B5QooFxD7wh0Q9+4BNf7HBKQGMPzn/mkP"
        "of5MymP4CQpQBoYMFSGfLtwbthScJs3uTAFRDA8W+uvE+08DpxJiAv/npAdf/9Hk/PMkEHIFru/P+EsCOv6u9zgFN/Mn+UvZWO+u5Gb/"
        "svpp/HsZUgyCE/r1svtY2ogm1AcL/470SOxZKz3xlgKvD4Icw/c3F+MhkQsQ4KcL7RrMBx0XaBAeBAETmfc56JUA//qV/ZMf8/T8A6EE"
        "jAEbCGQOVwzz7J4S6/juCncKghc+B+X9oQ5i/5EQ2xJ/4sz75PlqCfb/uBXIDJYPavNsBbT2b/1PAzkapBdZD3n7+SBo/0v64fCy4sn1"
        "1BHoBaT+eu0w6tUUBQP+GP4NTRl8ChUUJgfSAUAebf/BBDEntusB70PwCN1iAwzzb9rZ4JkFjPMrAwf6Kv36IantQwDRCYfmgur2Exgo"
        "M/hNDdcEUPV4AvgTXgiJMgP9AfjpISYK/QH8+TsATQca/CrxUglQFD0CQATe9pgtkeuADWj/meKE/SQc8Pq49Eb4JP/z8EYGowNOAd7x"
        "BjDjI4DsHBBIHc702/c89tH6y98f7RDzMRHiGjf9NwuF+lkVDfcv9Hzn0e/IBnEeNupfACj2Pw2VGFz+Fvui8sAAdAUM8B78FuuCCMoA"
        "qh6N+YMDjBtu+HH9OvHlA8rlvfod7h8l1eqCAZoF7xSgB6n0tAnY5doiJ/wsCrfv9ewxALHpe/TnDKgCOhdF9LcQjPinHfHx/hHo964J"
        "RP9m+CXsZv0MBP8HawY4AXIN4wvEAsv7y/FV5v3/0/Zb77b5oRFqCa7tWiuP88QPaOrK/FAGXAz69fgMSPE85ZoUpATXClYHOw9pI3He"
        "TAIaGAkcCBKmDy31JedR+c8OF/nRC8HiQf6l8AX1rvpsB6nyIALQFAf3r/dc/Ij0iQLP6DwApAuJ8eQA2Q9tBQHeAvhb7Qz6+BPEGfTt"
        "WwhFKGb/Lv3fDOfz6vppA971bBXQ8cn44OnQ717u8eBU6Cf8/w8B+Q72qwEl0QUKQ+Vl8RAFu/3lGajqzAo/EtsHfhtXAxH7BPQD/M3u"
        "l/dW5DYQStz3/8X/1hbdCtfoqO41Em8AUfN0CEYWpPViBNjf/QzgAn0PbwZ9B8kPRRkoDHoEMQ1A/OMFke43HxkB7QdwEhEVD/TCCk0q"
        "uviy8FYcQPs5AWkDhwfP8mEFXObZ9XT90grt//kNg+3n+Z38QOws72kFIfReB2r3Tg/gCab21/79AhsL7PEJ6V38JAlBA9T2vPla8LMg"
        "aOyZDMkTnw5V/3LXpPO0GKveJh+v8mfdkxP0zy4XYv3yD3oBudZBAmv6DgdD/u/2L+ObBpUSuwGs7fcJj+uYBHX5V/Yq+G3ocf8R4FwE"
        "7vKQ8p7xBe2N5rEGwApI8GDbiPuj+TEEhv6IARzjYRPRGU/1Lw+U9Yn80806+8TqZPhOHUoRtvhv/2cTwwnTBSsWmQK84mb5OfHoDBrs"
        "gvWvAl3nuP3kE6X3OwiBAJz7zATrD2gNRvVT4i/oIwymFinydPoVCcbuuwSYEHISPAgO/9nqrRJEC60WugGJCFL1V/FF/HTo7f3ZEc/3"
        "lPo1BY4gag7l/2Ip7Aps/qISo/sk8JwFCxtj9eMC7Rar+dIHjg5y6PokJQGHB7rxINQJ7pf6Bv7Z9EwYWBK3DTAEevhL2i/ohSDJB7ft"
        "4PjG80j9jv33Gy8A3hQCEkUMqg6c+K/pdvzl+yoOPf9i9vHoXv7n7gz5wwFm8WsKAwWT7PYCMhWZ5N0CPe+K5zX5RvaKGsAAPwkW/XUN"
        "ZP52BJQUPgkc/GcFDwCP+DX9c+SUGFUDl+249cbcJh1SEPoMiwnl8B7tXxOQCgblAv/E87z8IgEm7wsVSgRxHRz4XfpxB0vqMhKFAFsC"
        "1PQbALUesfm2IwkNhwNcB4AG5A7UE1IHpOnf/JYKwAWyDoPxlgwwBpju9he8ASLz0fxd7MIJntxDAAD1DPZd+fzrPPTX/A0RDgX7DTDy"
        "A+goCMoWuAqR9jnjke9QAW3qYAOUELjwkQY2+yb10hcx80T/+gsqCRz+Q/ad7k35B/jw+fT9kOC49HT3Y+vUGvP/KAPD8WcJag8kDdUR"
        "QPxe5dXxWg5RBrcI9P3TBPPpPfnH+jT7RRBf9fUKHgF1DAH8FvbO7QUJgd9z/+8T9wGlDJwmwAsnBRoQcupv5cLxdv7eAeAYSvZY4bIG"
        "qvFJ++cKKgazFfrzYefCAXLkT+8="
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

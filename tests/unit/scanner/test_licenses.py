"""Licences in headers, and which of them are left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scanner import licenses

APACHE = """# Copyright 2024 The Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
"""
GPL = """/*
 * This program is free software; you can redistribute it and/or modify
 * it under the terms of the GNU General Public License as published by
 * the Free Software Foundation; either version 2 of the License, or
 * (at your option) any later version.
 */
"""
LGPL = """// This library is free software; you can redistribute it and/or modify it under
// the terms of the GNU Lesser General Public License version 2.1 as published by the FSF.
"""
AGPL = "-- under the terms of the GNU Affero General Public License, version 3,\n-- as published by\n"
MIT = """% Permission is hereby granted, free of charge, to any person
% obtaining a copy of this software
"""
ISC = "# Permission to use, copy, modify, and/or distribute this software for any\n# purpose with or without fee\n"
BSD = "Redistribution and use in source and binary forms, with or without modification, are permitted\n"


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("// SPDX-License-Identifier: MIT\n", "MIT"),
        ("/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */", "GPL-2.0-only WITH Linux-syscall-note"),
        ("<!-- SPDX-License-Identifier: (apache-2.0 or mit) -->", "Apache-2.0 OR MIT"),
        ("# SPDX-License-Identifier: LicenseRef-Acme\n" + APACHE, "LicenseRef-Acme"),
        ("# SPDX-License-Identifier: MIT/Apache-2.0\n", "MIT/Apache-2.0"),
        (APACHE, "Apache-2.0"),
        (GPL, "GPL-2.0-or-later"),
        (GPL.replace(", or\n * (at your option) any later version", ""), "GPL-2.0-only"),
        (LGPL, "LGPL-2.1-only"),
        (AGPL, "AGPL-3.0-only"),
        (MIT, "MIT"),
        (ISC, "ISC"),
        ("; This Source Code Form is subject to the terms of the Mozilla Public\n; License, v. 2.0.", "MPL-2.0"),
        (BSD, "BSD-2-Clause"),
        (BSD + "3. Neither the name of the University nor", "BSD-3-Clause"),
        ("# Use of this source code is governed by a BSD 3-Clause license\n", "BSD-3-Clause"),
        ("# Distributed under the Boost Software License, Version 1.0.", "BSL-1.0"),
        ("def license():\n    return 'no permission'\n", ""),
        ("# Licensed to the highest bidder\n", ""),
        ("x = 1\n" * 2000 + "# SPDX-License-Identifier: MIT\n", ""),
        ("", ""),
    ],
)
def test_headers(header: str, found: str) -> None:
    assert licenses.detect(header) == found


@pytest.mark.parametrize(
    ("expression", "patterns", "left_out"),
    [
        ("GPL-3.0-only", ("GPL-*",), "GPL-3.0-only"),
        ("LGPL-3.0-only", ("GPL-*",), ""),
        ("MIT OR GPL-3.0-only", ("GPL-*",), ""),
        ("AGPL-3.0-only OR GPL-3.0-only", ("*GPL-*",), "AGPL-3.0-only"),
        ("MIT AND GPL-3.0-only", ("gpl-3.0-only",), "GPL-3.0-only"),
        ("(MIT OR GPL-2.0-only) AND BSD-3-Clause", ("GPL-*",), ""),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ("GPL-2.0-only",), "GPL-2.0-only"),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ("*Classpath*",), "GPL-2.0-only WITH Classpath-exception-2.0"),
        ("LicenseRef-Acme", ("LicenseRef-*",), "LicenseRef-Acme"),
        ("MIT/Apache-2.0", ("MIT*",), "MIT/Apache-2.0"),
        ("", ("*",), ""),
        ("MIT", (), ""),
    ],
)
def test_what_is_left_out(expression: str, patterns: tuple[str, ...], left_out: str) -> None:
    assert licenses.excluded(expression, patterns) == left_out


@given(st.text(max_size=200))
def test_no_tag_breaks_it(tail: str) -> None:
    found = licenses.detect("SPDX-License-Identifier: " + tail)
    licenses.excluded(found, ("GPL-*",))

"""What github-linguist 9.6 says of a file: cases where go-enry, which has older data, says otherwise."""

from __future__ import annotations

import enry
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scanner import generated, languages

WORDS = """
a.py docs doc theme _build static env cache dist deps debian configure config.guess config.sub aclocal.m4 ltsugar.m4
lt~obsolete.m4 dotnet-install.sh cpplint.py node_modules .yarn releases sdks plugins _esy bower_components rebar
erlang.mk Godeps _workspace testdata .indent.pro a.min.js a-min.css import.css bootstrap.min.js custom.bootstrap.css
font-awesome.css fontawesome foundation.css normalize.css skeleton.css Bourbon b.scss animate.css materialize.js select2
b.js bulma.css 3rd-party thirdparty vendor vendors Vvendor Extern Externals run.n bootstrap-datepicker jquery.js
jquery-1.2.js jquery-ui.js jquery.fn.gantt.js fuelux.js bootbox.js pdf.worker.js slick.min.js leaflet.draw.css
Leaflet.Coordinates-1.2.3.src.js Control.FullScreen.css wicket-leaflet.js .sublime-project .vscode prototype.js
effects.js controls.js dragdrop.js a.d.ts mootools1.2.3.js dojo.js MochiKit.js yahoo-x.js yui.js ckeditor.js tiny_mce.js
tiny_mce langs ace-builds fontello.css MathJax Chart.js CodeMirror lib mode shBrushA.js shCore.js shLegacy.js
angular.js d3.v3.js react-dom.js flow-typed modernizr-1.2.js modernizr.custom.1.js knockout-1.2.3.js admin_media
fabfile.py waf .osx a.xctemplate a.imageset Carthage Sparkle Crashlytics.framework Fabric.framework Realm.framework
.gitattributes .gitignore .gitmodules gradlew gradlew.bat gradle wrapper mvnw mvnw.cmd .mvn a-vsdoc.js
a.intellisense.js microsoftAjax.js Packages a.1 extjs a.xml html5shiv.js test Tests fixtures spec cordova.js
foundation.js Vagrantfile .DS_Store inst extdata octicons.css sprockets-octicons.scss activator activator.bat
proguard.pro proguard-rules.pro puphpet .google_apis Jenkinsfile .gitpod.Dockerfile .github .obsidian .teamcity src
"""
NAMES = WORDS.split()


@pytest.mark.parametrize(
    ("path", "content", "language"),
    [
        ("robots.txt", "User-agent: *\n", "Robots Exclusion Rules"),
        ("app.service", "[Unit]\nDescription=x\n", "INI"),
        ("app.target", "[Unit]\nDescription=x\n", "INI"),
        ("app.target", "nothing of that kind\n", ""),
        ("part.stl", "something\n", ""),
        ("part.stl", '<?xml version="1.0"?>\n<a/>\n', "XML"),
        ("a.pc", "Name: a\nDescription: b\nVersion: 1\n", "pkg-config"),
        ("a.pc.in", "Name: a\n", "pkg-config"),
        ("a.pc", "int main() {\n  EXEC SQL COMMIT;\n}\n", "Pro*C"),
        ("Makefile.pc", "all:\n", "Makefile"),
        ("a.tpl", "{{- if .Values }}\n", "Go Template"),
        ("a.tpl", "{if $x}\n", "Smarty"),
        ("a.txt", "127.0.0.1 localhost\n", "Hosts File"),
        ("a.txt", "[Adblock Plus 2.0]\n||ads^\n", "Adblock Filter List"),
        ("a.txt", "words\n", "Text"),
        ("a.baml", "class A {}\n", "BAML"),
        ("base.tsconfig.json", "{}\n", "JSON with Comments"),
        ("a.json", "{}\n", "JSON"),
        ("tool.js", "#!/usr/bin/env -S deno run\nlet x = 1\n", "JavaScript"),
        ("tool.js", "#!/usr/bin/env node\nlet x = 1\n", "JavaScript"),
        ("view.blade.php", "@if (true)\n", "Blade"),
        ("jquery.min.js", "var x;\n", "JavaScript"),
        ("a.py", "# vim: ft=ruby\n", "Ruby"),
        ("a.rb", "puts 1\n" * 20 + "# -*- mode: python -*-\n", "Python"),
        ("a.rb", "puts 1\n" * 6 + "# -*- mode: python -*-\n" + "puts 1\n" * 6, "Ruby"),
        ("a.h", "#pragma once\nnamespace a { class B; }\nstd::string f();\n", "C++"),
        ("a.h", "#import <Foundation/Foundation.h>\n@interface A : NSObject\n@end\n", "Objective-C"),
        ("a.h", "int f(void);\n", "C"),
        ("script", "#!/usr/bin/env python3\n", "Python"),
        ("empty.py", "", ""),
    ],
)
def test_the_language(path: str, content: str, language: str) -> None:
    assert languages.identify(path, content.encode()).language == language


@pytest.mark.parametrize(
    ("alias", "language"),
    [
        ("golang", "Go"),
        ("Emacs-Lisp", "Emacs Lisp"),
        ("c++", "C++"),
        ("baml", "BAML"),
        ("power-query", "Power Query"),
        ("Perl,5", "Perl"),
        ("nonsense", ""),
    ],
)
def test_an_alias(alias: str, language: str) -> None:
    assert languages.by_name(alias) == language


@pytest.mark.parametrize("language", ["BAML", "Pro*C", "Python", "Quint"])
def test_newer_languages_are_code(language: str) -> None:
    assert languages.is_known(language)
    assert languages.is_code(language)
    assert not languages.is_code("pkg-config")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "gradlew",
            "sub/gradlew.bat",
            "mvnw",
            "mvnw.cmd",
            "bun.lock",
            "flake.lock",
            "uv.lock",
            "sub/package-lock.json",
        ),
        *("a/node_modules/x/y.js", "Form.Designer.cs", "a.js.map", ".idea/x.xml", "x/Pods/a.m", "Manifest-v1.11.toml"),
        *("vendor/github.com/a/b.go", "esy.lock/x.esy.lock", ".terraform.lock.hcl", "mise.lock"),
    ],
)
def test_paths_of_generated_files(path: str) -> None:
    assert generated.is_generated(path, b"x\n")


@pytest.mark.parametrize(
    "path", ["gradlew.py", "src/main.go", "node_module/a.js", "a.designer.py", "vendor/github/a.go"]
)
def test_paths_of_written_files(path: str) -> None:
    assert not generated.is_generated(path, b"x\n")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("a.go", "package a\n\n// Code generated by x. DO NOT EDIT.\n"),
        ("a.js", "x" * 300 + "\n"),
        ("a.css", "a{}\n/*# sourceMappingURL=a.css.map */\n"),
        ("a.py", "# Generated by the protocol buffer compiler.  DO NOT EDIT!\nimport x\n"),
        ("a.map", '{"version":3,"x":1}'),
        ("a.dart", "// GENERATED CODE - DO NOT MODIFY BY HAND\npart of x;\n"),
        ("a.rbi", "# typed: true\n\n# DO NOT EDIT MANUALLY\n# x\n# Please run `bin/tapioca gem`\n"),
        ("a.html", "<html>\n<head>\n<meta name='generator' content='Org mode'>\n</head>\n"),
        ("a.html", "<!doctype html>\n<!-- Generated by Doxygen 1.9 -->\n"),
        ("a.coffee.js", "(function() {\n  var _ref, _i, _len;\n  x;\n}).call(this);\n"),
        ("a.c", "/* Generated by Cython 3.0 */\nint x;\n"),
        ("a.yml", "a: 1\nb: 2\nrecorded_with: VCR 6.0\n"),
        ("a.java", "// x\n/* This file is generated by jOOQ. */\n"),
        ("ppport.h", "\n" * 8 + "Automatically created by Devel::PPPort\n" + "\n" * 8),
    ],
)
def test_contents_of_generated_files(path: str, content: str) -> None:
    assert generated.is_generated(path, content.encode())
    assert not generated.is_generated(path, b"")


def test_binary_files_are_told_by_signature_or_nul() -> None:
    assert languages.is_binary(b"%PDF-1.4 all text")
    assert languages.is_binary(b"x" * 100_000 + b"\0")
    assert not languages.is_binary("héllo".encode("utf-16"))
    assert not languages.is_binary(b"plain")


@given(st.lists(st.sampled_from(NAMES) | st.text("aeim.-/_1", max_size=4), min_size=1, max_size=4))
def test_vendored_paths_are_those_of_enry(names: list[str]) -> None:
    path = "/".join(names)
    assert languages.from_path(path).vendored == bool(enry.is_vendor(path))


@pytest.mark.parametrize("name", NAMES)
def test_no_vendored_name_is_missed(name: str) -> None:
    for path in (name, f"{name}/a.c", f"src/{name}", f"src/{name}/fixtures.js"):
        assert languages.from_path(path).vendored == bool(enry.is_vendor(path))


def test_folders_that_are_newer_than_enry() -> None:
    assert languages.from_path("src/xvba_modules/a.bas").vendored
    assert not languages.from_path("src/xvba_modules").vendored

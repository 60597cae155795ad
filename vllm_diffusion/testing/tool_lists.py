"""Tools as three usual servers of the Model Context Protocol offer them, in other words.

A host of source code (49), a browser (21) and a file system (14): names and schemas of the kind and
the number that an agent sends with every request. Descriptions are left out: no constraint reads
them.
"""

from __future__ import annotations

import re
from typing import Any, Final

_TYPES: Final = {"s": "string", "n": "number", "b": "boolean"}
_SOURCE: Final = r"""
add_comment owner repo issue:n body
add_review_comment owner repo pull:n path body level:FILE|LINE line?:n side?:LEFT|RIGHT startLine?:n
assign_issue owner repo issue:n
create_branch owner repo branch from_branch?
create_issue owner repo title body? assignees?:[] labels?:[] milestone?:n
write_file owner repo path content message branch sha?
create_pull owner repo title head base body? draft?:b maintainer_can_modify?:b
create_repository name description? private?:b autoInit?:b
delete_file owner repo path message branch
fork_repository owner repo organization?
get_scan_alert owner repo alertNumber:n
get_commit owner repo sha PAGE
get_dependency_alert owner repo alertNumber:n
get_discussion owner repo discussion:n
get_discussion_comments owner repo discussion:n after? perPage?:n1..100
get_file owner repo path? ref? sha?
get_issue owner repo issue:n
get_issue_comments owner repo issue:n PAGE
get_me
get_pull owner repo pull:n
get_pull_diff owner repo pull:n
get_pull_files owner repo pull:n PAGE
get_pull_reviews owner repo pull:n
get_pull_status owner repo pull:n
get_workflow_run owner repo run_id:n
list_branches owner repo PAGE
list_scan_alerts owner repo ref? severity?:critical|high|medium|low|note state?:open|closed tool?
list_commits owner repo sha? author? PAGE
list_discussions owner repo category? orderBy?:CREATED|UPDATED direction?:ASC|DESC after?
list_issues owner repo state?:OPEN|CLOSED labels?:[] orderBy?:CREATED|UPDATED|COMMENTS since? after?
list_notifications filter?:default|read|participating since? before? owner? repo? PAGE
list_pulls owner repo state?:open|closed|all head? base? sort?:created|updated|popularity PAGE
list_tags owner repo PAGE
list_workflow_runs owner repo workflow actor? branch? event?:push|pull|schedule|release status? PAGE
mute_notification notification action:ignore|watch|delete
merge_pull owner repo pull:n commit_title? commit_message? merge_method?:merge|squash|rebase
push_files owner repo branch files:{path,content} message
request_review owner repo pull:n
rerun_failed_jobs owner repo run_id:n
search_code query sort? order?:asc|desc PAGE
search_issues query owner? repo? sort?:comments|reactions|created|updated order?:asc|desc PAGE
search_groups query sort?:followers|repositories|joined order?:asc|desc PAGE
search_pulls query owner? repo? sort?:comments|created|updated order?:asc|desc PAGE
search_repositories query PAGE
search_users query sort?:followers|repositories|joined order?:asc|desc PAGE
submit_review owner repo pull:n event:APPROVE|REQUEST_CHANGES|COMMENT body?
update_issue owner repo issue:n title? body? state?:open|closed labels?:[] assignees?:[]
update_pull owner repo pull:n title? body? state?:open|closed base? maintainer_can_modify?:b
update_pull_branch owner repo pull:n expectedHeadSha?
"""
_BROWSER: Final = r"""
browser_close
browser_resize width:n height:n
browser_console_messages onlyErrors?:b
browser_handle_dialog accept:b promptText?
browser_evaluate function element? ref?
browser_file_upload paths?:[]
browser_fill_form fields:{name,type:textbox|checkbox|radio|combobox|slider,ref,value}
browser_install
browser_press_key key
browser_type element ref text submit?:b slowly?:b
browser_navigate url
browser_navigate_back
browser_network_requests
browser_take_screenshot type?:png|jpeg filename? element? ref? fullPage?:b
browser_snapshot
browser_click element ref doubleClick?:b button?:left|right|middle modifiers?:[Alt|Control|Shift]
browser_drag startElement startRef endElement endRef
browser_hover element ref
browser_select_option element ref values:[]
browser_tabs action:list|new|close|select index?:n
browser_wait_for time?:n text? textGone?
"""
_FILES: Final = r"""
read_file path tail?:n head?:n
read_text_file path tail?:n head?:n
read_media_file path
read_multiple_files paths:[]
write_file path content
edit_file path edits:{oldText,newText} dryRun?:b
create_directory path
list_directory path
list_directory_with_sizes path sortBy?:name|size
directory_tree path
move_file source destination
search_files path pattern excludePatterns?:[]
get_file_info path
list_allowed_directories
"""


def code_host() -> list[dict[str, Any]]:
    """The tools of a host of source code: name and parameters of each."""
    return _read(_SOURCE)


def browser() -> list[dict[str, Any]]:
    """The tools of a browser."""
    return _read(_BROWSER)


def file_system() -> list[dict[str, Any]]:
    """The tools of a file system."""
    return _read(_FILES)


def words(tools: list[dict[str, Any]]) -> list[str]:
    """The words that names and values are made of, which a real vocabulary has as tokens."""
    names = set(re.findall(r"[A-Za-z]+", str(tools)))
    return sorted({word for name in names for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)})


def _read(lines: str) -> list[dict[str, Any]]:
    page = "page?:n1.. perPage?:n1..100"
    read = []
    for line in lines.strip().splitlines():
        name, *fields = line.replace("PAGE", page).split()
        read.append({"name": name, "parameters": _object(fields)})
    return read


def _object(fields: list[str]) -> dict[str, Any]:
    named = [field.partition(":")[::2] for field in fields]
    return {
        "type": "object",
        "properties": {name.rstrip("?"): _value(kind or "s") for name, kind in named},
        "required": [name for name, _ in named if not name.endswith("?")],
        "additionalProperties": False,
    }


def _value(kind: str) -> dict[str, Any]:
    """What a field may be: a letter for its type, bounds, values, a list or a list of objects."""
    if kind.startswith("["):
        return {"type": "array", "items": _value(kind[1:-1] or "s")}
    if kind.startswith("{"):
        return {"type": "array", "items": _object(kind[1:-1].split(","))}
    if "|" in kind:
        return {"type": "string", "enum": kind.split("|")}
    if ".." in kind:
        low, high = kind[1:].split("..")
        most = {"maximum": int(high)} if high else {}
        return {"type": "number", "minimum": int(low), **most}
    return {"type": _TYPES[kind]}

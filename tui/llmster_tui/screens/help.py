"""What the keys do and what the signs mean."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from llmster_tui.state import UNKNOWN

_HELP = f"""\
Keys
  Tab, Shift+Tab   go from table to table
  ↑ ↓              select a row; what is known of it stands below its table
  d                drain the selected node: it gets no new requests; again: it does
  r                give the selected node its next role: mixed, prefill, decode
  l                load a model on the selected node
  u                unload the selected instance
  q                leave; the pool goes on

Nodes
  ● online   ◐ suspect: missed reports   ○ lost: gets no traffic   ◒ draining

Instances
  ● ready   ◔ loading   ◌ starting, stopping   ↻ backoff: will start again   ✕ failed

Requests
  colocated   one node computed the prompt and the answer
  split       ws-1 ▶ ws-2: ws-1 computed the prompt, ws-2 the answer; KV and Hand-over
              say how much went between them and how long the second waited for it
  TTFT        time to the first token      TPOT   time per token after it

{UNKNOWN}  not known"""


class HelpScreen(ModalScreen[None]):
    """Closes with any of the keys that one would try."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,q,enter", "dismiss(None)", "Close")
    ]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide") as dialog:
            dialog.border_title = "Help"
            yield Static(_HELP, markup=False)
            yield Static("Esc close", classes="note")

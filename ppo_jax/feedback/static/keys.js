// The keys of the labelling page, and nothing else: every page works without this file.
"use strict";

const selects = [...document.querySelectorAll("select")]; // one for each response that is to be ranked
const output = document.getElementById("next");
let tied = false;

function nameOf(event) {
  // By position for digits, and for letters of other scripts: ё and т are on t's key, & on the 1 of a French keyboard.
  const digit = /^(?:Digit|Numpad)([0-9])$/.exec(event.code);
  if (digit) return digit[1];
  return /^[!-~]+$/.test(event.key) ? event.key.toLowerCase() : event.code.replace(/^Key/, "").toLowerCase();
}

function tell(text) {
  if (output) output.textContent = text;
}

function rank(select) {
  if (select.value) {
    select.value = "";
    tied = false;
    tell("taken back");
    return;
  }
  // No gaps first, so that the next rank is always one of the list.
  const used = [...new Set(selects.map((other) => Number(other.value)).filter(Boolean))].sort((a, b) => a - b);
  for (const other of selects) if (other.value) other.value = used.indexOf(Number(other.value)) + 1;
  select.value = used.length + (tied && used.length ? 0 : 1);
  tell(`${select.labels[0].textContent}: ${select.value}`);
  tied = false;
}

document.addEventListener("keydown", (event) => {
  const place = event.target;
  const key = nameOf(event);
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
  if (place.matches("textarea, input")) {
    if (key === "escape") place.blur();
    return;
  }
  if (key === "enter" && place.matches("button, a")) return; // presses that one
  const button = document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (button) {
    button.click();
  } else if (key === "c" && document.getElementById("comment")) {
    document.getElementById("comment").focus();
  } else if (key === "t" && selects.length) {
    tied = true;
    tell("the next one is tied with the last");
  } else if (selects[key - 1] && !place.matches("select")) {
    rank(selects[key - 1]);
  } else {
    return;
  }
  event.preventDefault();
});

document.documentElement.classList.add("keys"); // shows which key does what

// What the page needs for readers of the keyboard and of screen readers, and Sphinx and furo leave out.
addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll("p.caption[role=heading]")) caption.ariaLevel = "2";
  for (const part of document.querySelectorAll(".sig > dl, .sig > dl > dd")) part.role = "none"; // no terms, only a look
  for (const box of document.querySelectorAll("pre, .table-wrapper, .cell_output")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0; // scrolls by the arrow keys
  }
});

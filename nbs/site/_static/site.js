// The arrows that unfold a part of the navigation: say which, for those who don't see where they stand.
document.addEventListener("DOMContentLoaded", () => {
  for (const arrow of document.querySelectorAll(".bd-sidebar-primary summary"))
    arrow.setAttribute("aria-label", "Pages of: " + arrow.closest("li").querySelector("a").textContent.trim());
});

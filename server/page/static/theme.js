// The colours that were chosen last, before anything is drawn in others.
try {
  const theme = localStorage.getItem("tightrope.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Nothing may be kept in this browser.
}

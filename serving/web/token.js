// The dialog that asks for a token, where the service wants one.

import { hasToken, onUnauthorized, setToken } from "./api.js";

const at = id => document.getElementById(id);

/** Shows the dialog; settles with whether a token was given. */
function askForToken(why) {
  at("token-why").textContent = why;
  at("token-value").value = "";
  at("token").returnValue = "";
  if (!at("token").open) at("token").showModal();
  return new Promise(resolve => at("token").addEventListener("close", () => {
    const given = at("token").returnValue === "ok" && at("token-value").value.trim();
    if (given) setToken(given);
    at("token-open").hidden = !hasToken();
    resolve(Boolean(given));
  }, { once: true }));
}

export function prepare() {
  onUnauthorized(askForToken);
  at("token-open").hidden = !hasToken();
  at("token-open").addEventListener("click", () => askForToken(""));
  at("token-cancel").addEventListener("click", () => at("token").close());
}

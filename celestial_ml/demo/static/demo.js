// What the page needs beside Gradio: names for screen readers, the way to the answer on a phone, a word where no answer
// comes, a paste that finds the open tab, and the camera.
() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  document.documentElement.lang = "en";

  const name = (selector, attributes) => {
    const element = $(selector);
    if (element) Object.entries(attributes).forEach(([key, value]) => element.getAttribute(key) === value || element.setAttribute(key, value));
  };
  const label = () => {
    name("#why", {role: "region", "aria-label": "Why"});
    name("#many-table", {role: "region", "aria-label": "Answers", tabindex: "0"});
    document.querySelectorAll(".drop input[type=file]").forEach(input => input.setAttribute("aria-label", "Choose a picture"));
  };

  // A screen reader says the answer alone, not the ten probabilities below it.
  const spoken = document.createElement("p"), heard = {};
  spoken.id = "spoken";
  spoken.setAttribute("role", "status");
  document.body.append(spoken);
  const speak = () => ["#right", "#fool-answer", "#found", "#both", "#cell", "#many-table", "#label-desk"].forEach(selector => {
    const place = $(selector);
    const words = place?.offsetParent ? [...place.querySelectorAll("h2, h3, .plain")].slice(0, 2).map(one => one.textContent).join(". ") : "";
    if (words && heard[selector] !== words && performance.now() > 2000) spoken.textContent = words;
    heard[selector] = words;
  });

  // On a phone the answer is below what was tapped: the page goes there, and stays there until a person moves it.
  const narrow = matchMedia("(max-width: 820px)"), calm = matchMedia("(prefers-reduced-motion: reduce)");
  const answers = {"[data-tile]": "#desk", "#fool-buttons .primary": "#found", "[data-cell]": "#cell"};
  const drops = {"drop": "#desk", "compare-drop": "#compare", "many-drop": "#many-table", "folder-drop": "#many-table"};
  let goal = null;
  const go = () => $(goal)?.scrollIntoView({block: "start", behavior: calm.matches ? "auto" : "smooth"});
  const aim = selector => { goal = narrow.matches && selector; if (goal) go(); };
  ["pointerdown", "wheel", "touchmove", "keydown"].forEach(kind => document.addEventListener(kind, () => { goal = null; }, {passive: true, capture: true}));
  document.addEventListener("click", event => {
    const tapped = Object.keys(answers).find(one => event.target.closest(one));
    if (tapped) aim(answers[tapped]);
    if (event.target.closest("[role=tab]")) event.target.closest("[role=tab]").scrollIntoView({block: "nearest", inline: "center"});
    const removed = event.target.closest("[data-remove]")?.closest(".dropper");
    if (removed) $(".drop button", removed)?.focus({preventScroll: true});
  });
  // A link is copied where a page may do that; elsewhere it is followed, and stands in the address bar.
  document.addEventListener("click", async event => {
    const link = event.target.closest("[data-link]");
    if (!link || !navigator.clipboard || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const words = await navigator.clipboard.writeText(link.href).then(() => "Link copied", () => null);
    if (!words) { location.assign(link.href); return; }
    link.textContent = spoken.textContent = words;
  });

  // The answer as a page of its own, with what it needs.
  const page = () => {
    const copy = selector => {
      const part = $(selector).cloneNode(true);
      part.querySelectorAll(".offer, [data-remove], .sky p").forEach(one => one.remove());
      return part.outerHTML;
    };
    const style = [...document.querySelectorAll("style")].map(one => one.textContent).filter(words => words.includes("--ink")).join("");
    const dark = document.querySelector(".dark") ? "dark" : "", title = $("#right h2").textContent;
    const line = $("#foot p").firstChild.textContent;
    return [title, `<!doctype html><html lang="en" class="${dark}"><meta charset="utf-8"><meta name="viewport" content="width=device-width">` +
      `<title></title><style>${style}</style><body class="gradio-container ${dark}"><main class="saved"><h1></h1><div id="desk">` +
      `<div id="left" class="dropper">${copy("#left .sky")}</div><div id="right">${copy("#right .says")}</div><div id="why">${copy("#why .why")}</div></div>` +
      `<p class="fine"></p></main></body></html>`, line];
  };
  document.addEventListener("click", event => {
    if (!event.target.closest("[data-save]")) return;
    const [title, html, line] = page(), saved = new DOMParser().parseFromString(html, "text/html");
    saved.title = title;
    $("h1", saved).textContent = $("#hero h1").textContent;
    $("main > .fine", saved).textContent = `${line} Saved on ${new Date().toLocaleString("en-GB", {dateStyle: "long", timeStyle: "short"})}.`;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["<!doctype html>", saved.documentElement.outerHTML], {type: "text/html"}));
    link.download = `${title.replace(/[^\w-]+/g, " ").trim() || "answer"}.html`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  document.addEventListener("change", event => {
    const drop = event.target.matches("input[type=file]") && event.target.closest(".drop");
    if (drop) aim(drops[drop.id]);
  }, true);

  label();
  new MutationObserver(changes => {
    label();
    speak();
    if (goal && changes.some(change => $(goal)?.contains(change.target))) go();
  }).observe(document.body, {subtree: true, childList: true});

  const notice = document.createElement("p");
  notice.id = "notice";
  notice.setAttribute("role", "alert");
  document.body.append(notice);
  const refusal = async answer => {
    if (answer.status === 401) return "Your login has ended. Load the page again.";
    const said = (await answer.json().catch(() => ({}))).error;
    return said?.message ? `No answer: ${said.message}. ${said.hint ?? ""}` : "No answer: the server made a mistake. Try again.";
  };
  const fetched = window.fetch.bind(window);
  window.fetch = async (...asked) => {
    const question = /\/(login|gradio_api\/(run|upload|queue\/join))\b/.test(String(asked[0]?.url ?? asked[0]));
    try {
      const answer = await fetched(...asked);
      if (question) notice.textContent = answer.ok ? "" : await refusal(answer.clone());
      return answer;
    } catch (mistake) {
      if (question && mistake.name !== "AbortError") notice.textContent = "The server doesn't answer. Is it still running?";
      throw mistake;
    }
  };

  const give = file => {
    const input = [...document.querySelectorAll(".drop input[type=file]")].find(one => one.closest(".drop").offsetParent);
    if (!input) return;
    const carrier = new DataTransfer();
    carrier.items.add(file);
    input.files = carrier.files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
  };
  document.addEventListener("paste", event => {
    const file = [...(event.clipboardData?.files ?? [])].find(one => one.type.startsWith("image/"));
    if (file) { event.preventDefault(); give(file); }
  });

  const look = async () => {
    const devices = await navigator.mediaDevices?.enumerateDevices().catch(() => []) ?? [];
    document.documentElement.classList.toggle("has-camera", devices.some(one => one.kind === "videoinput"));
  };
  look();
  navigator.mediaDevices?.addEventListener("devicechange", look);
  const camera = async () => {
    const dialog = document.createElement("dialog");
    dialog.className = "camera";
    dialog.setAttribute("aria-label", "Camera");
    dialog.innerHTML = '<video autoplay playsinline muted></video><p role="status"></p>' +
      '<div><button class="take">Take the picture</button><button class="leave">Close</button></div>';
    document.body.append(dialog);
    dialog.showModal();
    const video = $("video", dialog);
    let stream = null;
    const leave = () => { stream?.getTracks().forEach(track => track.stop()); dialog.remove(); };
    dialog.addEventListener("close", leave);
    $(".leave", dialog).onclick = () => dialog.close();
    $(".take", dialog).onclick = () => {
      if (!video.videoWidth) return;
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
      canvas.getContext("2d").drawImage(video, 0, 0);
      canvas.toBlob(blob => { give(new File([blob], "camera.jpg", {type: "image/jpeg"})); dialog.close(); }, "image/jpeg", 0.92);
    };
    try {
      stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
      if (dialog.isConnected) video.srcObject = stream; else leave();
    } catch {
      $("p", dialog).textContent = "There is no camera that this page may use.";
    }
  };
  document.addEventListener("click", event => { if (event.target.closest("#camera")) camera(); });
}

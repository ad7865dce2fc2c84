// What the page needs beside Gradio: names for screen readers, a word where no answer comes, a paste that finds the
// open tab, and the camera.
() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  document.documentElement.lang = "en";

  const name = (selector, attributes) => {
    const element = $(selector);
    if (element) Object.entries(attributes).forEach(([key, value]) => element.getAttribute(key) === value || element.setAttribute(key, value));
  };
  const label = () => {
    name("#right", {"aria-live": "polite"});
    name("#why", {role: "region", "aria-label": "Why"});
    name("#fool-answer", {"aria-live": "polite"});
    name("#many-table", {role: "region", "aria-label": "Answers", tabindex: "0"});
    document.querySelectorAll(".drop input[type=file]").forEach(input => input.setAttribute("aria-label", "Choose a picture"));
  };
  label();
  new MutationObserver(label).observe(document.body, {subtree: true, childList: true});

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

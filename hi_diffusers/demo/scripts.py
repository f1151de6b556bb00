"""What the page runs in the visitor's browser once it is there."""

ESCAPE_STOPS = """() => document.addEventListener("keydown", event => {
    if (event.key === "Escape" && !document.querySelector("ul[role=listbox]") && !document.fullscreenElement)
        document.querySelector("#stop:not([disabled])")?.click()
}, true)"""
"""Lets Escape stop the drawing, unless it closes a list; it is asked before the list is gone."""
NAME_PARTS = """() => {
    const name = () => {
        document.querySelectorAll(".image-container > button:not([aria-label])")
            .forEach(one => one.setAttribute("aria-label", "Picture"));
        document.querySelectorAll("#picture img[alt='']").forEach(one => { one.alt = "The picture that was drawn" });
        document.querySelectorAll("#report:not([aria-live])").forEach(one => one.setAttribute("aria-live", "polite"));
        document.querySelectorAll(".empty[aria-label]:not([role])").forEach(one => one.setAttribute("role", "img"));
        document.querySelectorAll("#grid button:has(img), #history button:has(img)").forEach(one => {
            const seed = one.querySelector("img").alt;
            if (!one.ariaLabel?.endsWith(seed)) one.ariaLabel = seed;
        });
    };
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();
}"""
"""Completes gradio's names and roles for screen readers."""

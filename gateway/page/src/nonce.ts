// The policy lets only those style elements in that carry this page's nonce. xterm.js makes three of its own and knows no nonce.

/** Gives every style element the page makes from now on its nonce. To be called before the terminal is made. */
export function nonceStyles(): void {
  const nonce = document.querySelector<HTMLScriptElement>("script[nonce]")?.nonce;
  if (nonce === undefined || nonce === "") return;
  const create = document.createElement.bind(document);
  document.createElement = (name: string, options?: ElementCreationOptions): HTMLElement => {
    const made = create(name, options);
    if (name.toLowerCase() === "style") made.nonce = nonce;
    return made;
  };
}

// Fetches the page anew and puts it in place of the one shown. Without this script, the browser reloads it.
(() => {
  'use strict';
  const every = 2000;
  let busy = false;
  const refresh = async () => {
    // Not behind somebody's back: a hidden page costs nothing, a text being copied stays.
    if (busy || document.hidden || String(getSelection())) return;
    busy = true;
    try {
      const answer = await fetch(location.pathname, {
        cache: 'no-store', credentials: 'same-origin', signal: AbortSignal.timeout(5000),
      });
      if (!answer.ok) throw new Error(answer.status);
      const fresh = new DOMParser().parseFromString(await answer.text(), 'text/html');
      document.getElementById('page').replaceWith(fresh.getElementById('page'));
      document.title = fresh.title;
      document.body.classList.remove('stale');
    } catch {
      document.body.classList.add('stale');
    } finally {
      busy = false;
    }
  };
  setInterval(refresh, every);
  document.addEventListener('visibilitychange', refresh);
})();

import { useCallback, useEffect, useRef, useState } from "react";

/**
 * Keeps the end of a growing page in sight for as long as the person stays there. `end` goes on an element
 * behind the last one; `ready` tells that there is something to be at the end of.
 */
export function useStickToEnd(ready: boolean) {
  const end = useRef<HTMLDivElement>(null);
  const following = useRef(true);
  const [atEnd, setAtEnd] = useState(true);

  const scrollToEnd = useCallback(() => {
    following.current = true;
    window.scrollTo({ top: document.documentElement.scrollHeight });
  }, []);

  useEffect(() => {
    const mark = end.current;
    if (mark === null || !ready) return;
    const seen = new IntersectionObserver(([entry]) => setAtEnd(entry?.isIntersecting ?? true), {
      rootMargin: "0px 0px 120px 0px",
    });
    seen.observe(mark);
    // The page opens at its beginning; nobody scrolled there.
    scrollToEnd();
    // Only the person's own scrolling lets go of the end, not the page's growth.
    const onScroll = () => {
      const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
      following.current = scrollHeight - clientHeight - scrollTop < 80;
    };
    const grown = new ResizeObserver(() => {
      if (following.current) scrollToEnd();
    });
    if (mark.parentElement) grown.observe(mark.parentElement);
    window.addEventListener("scroll", onScroll, { passive: true });
    return () => {
      seen.disconnect();
      grown.disconnect();
      window.removeEventListener("scroll", onScroll);
    };
  }, [ready, scrollToEnd]);

  return { end, atEnd, scrollToEnd };
}

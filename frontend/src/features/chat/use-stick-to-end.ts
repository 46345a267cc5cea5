import { useCallback, useEffect, useRef, useState } from "react";

/** How close to the end one scrolls down to follow it again. */
const CLOSE_PX = 80;

/**
 * Keeps the end of a growing page in sight for as long as the person stays there. `end` goes on an element
 * behind the last one; `ready` tells that there is something to be at the end of. `restorePlace` shows what was in
 * sight at the last `keepPlace`, when something has come before it.
 */
export function useStickToEnd(ready: boolean) {
  const end = useRef<HTMLDivElement>(null);
  const following = useRef(true);
  const kept = useRef<number>(undefined);
  /** Where the page itself has scrolled to, or the person: what is above that was scrolled to by the person. */
  const place = useRef(0);
  const [atEnd, setAtEnd] = useState(true);

  const scrollToEnd = useCallback(() => {
    following.current = true;
    window.scrollTo({ top: document.documentElement.scrollHeight });
    place.current = window.scrollY;
  }, []);

  const keepPlace = useCallback(() => {
    const { scrollHeight, scrollTop } = document.documentElement;
    kept.current = scrollHeight - scrollTop;
  }, []);
  const restorePlace = useCallback(() => {
    if (kept.current === undefined) return;
    window.scrollTo({ top: document.documentElement.scrollHeight - kept.current });
    place.current = window.scrollY;
    kept.current = undefined;
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
    // Only the person's own scrolling lets go of the end, not the page's growth: upwards, however little.
    const onScroll = () => {
      const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
      const left = scrollHeight - clientHeight - scrollTop;
      if (left < 1 || (left < CLOSE_PX && scrollTop > place.current)) following.current = true;
      else if (scrollTop < place.current) following.current = false;
      place.current = scrollTop;
    };
    // On a busy page it may have scrolled to the end again before it hears of a scroll of the person.
    const onWheel = (event: WheelEvent) => {
      if (event.deltaY < 0 && window.scrollY > 0) following.current = false;
    };
    const grown = new ResizeObserver(() => {
      if (following.current) scrollToEnd();
    });
    if (mark.parentElement) grown.observe(mark.parentElement);
    window.addEventListener("scroll", onScroll, { passive: true });
    window.addEventListener("wheel", onWheel, { passive: true });
    return () => {
      seen.disconnect();
      grown.disconnect();
      window.removeEventListener("scroll", onScroll);
      window.removeEventListener("wheel", onWheel);
    };
  }, [ready, scrollToEnd]);

  return { end, atEnd, scrollToEnd, keepPlace, restorePlace };
}
